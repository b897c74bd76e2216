"""`dicom-node check`: prove the whole set-up before the PACS does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dicom_node.backup import backup_folder, lost_ledger, newest_backup
from dicom_node.cli.check_node import check_answering, check_ports
from dicom_node.cli.common import DEFAULT_CONFIG, AsJson, ConfigPath, console, opened_ledger, print_json, safe, table
from dicom_node.cli.findings import Finding, Verdict
from dicom_node.config import Config, ConfigError, DestinationConfig, PeerConfig, load_config
from dicom_node.net.peers import addresses_of
from pipeline.errors import BundleError
from storage.backup import ledger_file
from storage.errors import StorageError
from storage.ledger import utc_now

RESERVE_WARNING = 2.0  # warn when less than this many times the watermark is free


def check(
    config: ConfigPath = DEFAULT_CONFIG,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only ask the running node by C-ECHO: for a health check.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prove config, disk, ledger, backups, bundle, device, ports, peers and what they take.

    Exit code 1 when one fails, 2 when the configuration cannot be used.
    """
    try:
        findings, code = list(_findings(load_config(config), config, quick)), 1
    except ConfigError as error:
        findings = [Finding(check="config", verdict=Verdict.FAIL, text=line) for line in str(error).split("\n")]
        code = 2
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        style = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
        shown = table("dicom-node check", "check", "", "what was found")
        for finding in findings:
            shown.add_row(safe(finding.check), f"[{style[finding.verdict]}]{finding.verdict}", safe(finding.text))
        console.print(shown)
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(code)


def _findings(config: Config, path: Path, quick: bool) -> Iterator[Finding]:
    if quick:
        yield check_answering(config)
        return
    yield Finding(check="config", verdict=Verdict.OK, text=f"{path}: {_summary(config)}")
    yield from on_this_machine(config)
    yield from check_ports(config)
    yield from elsewhere(config)


def on_this_machine(config: Config) -> Iterator[Finding]:
    """What needs no network."""
    for one in CHECKS:
        yield one(config)
    yield check_callers(config)
    yield from check_ways(config)
    yield from check_certificates(config)
    if config.pipeline.shadow:
        yield check_shadow(config)


def elsewhere(config: Config) -> Iterator[Finding]:
    """Every peer and every destination."""
    for peer in config.peers:
        yield check_peer(config, peer)
    yield from (check_retrieve(config, peer) for peer in config.peers if peer.we_may)
    for destination in config.destinations:
        if destination.url:
            yield check_web(destination)
            continue
        if destination.commitment or destination.verify:
            yield check_proof(config, destination)
        if destination.transfer_syntax != "explicit":
            yield check_compression(config, destination)


def _summary(config: Config) -> str:
    return f"{len(config.peers)} peers, {len(config.destinations)} destinations, {len(config.rules)} rules"


def check_disk(config: Config) -> Finding:
    """The spool's folder can be written, and there is room above the watermark."""
    root = config.storage.root
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        _write_probe(root)
        stat = os.statvfs(root)
    except OSError as error:
        return Finding(check="disk", verdict=Verdict.FAIL, text=f"{root}: {error.strerror}")
    free, reserve = stat.f_bavail * stat.f_frsize, config.intake.min_free_bytes
    text = f"{root}: {free / 1e9:.1f} GB free; C-STORE is refused (A700) below {reserve / 1e9:.1f} GB"
    if free < reserve:
        return Finding(check="disk", verdict=Verdict.FAIL, text=text)
    if mode := root.stat().st_mode & 0o077:
        text += f"; its mode lets others in (0{mode:03o}): a start of the node closes it, or: chmod 700 {root}"
        return Finding(check="disk", verdict=Verdict.WARN, text=text)
    return Finding(check="disk", verdict=Verdict.WARN if free < RESERVE_WARNING * reserve else Verdict.OK, text=text)


def check_ledger(config: Config) -> Finding:
    """The ledger opens, is migrated, and takes a write: opening it commits one that changes nothing.

    One that is not there is not made here: that is for the node, which knows what to begin anew.
    """
    try:
        if config.has_ledger_file and not lost_ledger(config) and not (file := ledger_file(config.ledger_url)).exists():
            return _not_yet_made(file)
        with opened_ledger(config):
            pass
    except (StorageError, OSError) as error:
        return Finding(check="ledger", verdict=Verdict.FAIL, text=str(error))
    return Finding(check="ledger", verdict=Verdict.OK, text="opens and takes a write")


def _not_yet_made(file: Path) -> Finding:
    if not os.access(file.parent, os.W_OK | os.X_OK):
        text = f"{file}: its folder is not there, or cannot be written"
        return Finding(check="ledger", verdict=Verdict.FAIL, text=text)
    return Finding(
        check="ledger", verdict=Verdict.OK, text=f"{file}: is not there yet; the node's first start makes it"
    )


def check_backups(config: Config) -> Finding:
    """The folder of the ledger's backups takes a file; one that is not there can be made."""
    if not config.has_ledger_file or not config.storage.keep_backups:
        return Finding(check="backups", verdict=Verdict.OK, text="the node makes none: keep_backups, database_url")
    folder = backup_folder(config)
    try:
        if not folder.is_dir():
            there = next(place for place in (folder, *folder.parents) if place.exists())
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                text = f"{folder}: is not there, and cannot be made in {there}"
                return Finding(check="backups", verdict=Verdict.FAIL, text=text)
            return Finding(check="backups", verdict=Verdict.OK, text=f"{folder}: is made with the first backup")
        _write_probe(folder)
        newest = newest_backup(config)
    except OSError as error:
        return Finding(check="backups", verdict=Verdict.FAIL, text=f"{folder}: {error.strerror}")
    text = f"{folder}: the newest is {newest.name}" if newest else f"{folder}: none yet"
    return Finding(check="backups", verdict=Verdict.OK, text=text)


def _write_probe(folder: Path) -> None:
    """Write a file and remove it. Raises `OSError`."""
    probe = folder / f".check-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()


def check_bundle(config: Config) -> Finding:
    """The bundle is whole: every hash agrees."""
    return _whole("bundle", config.pipeline.bundle, config)


def check_shadow(config: Config) -> Finding:
    """So is the one that is only compared. A broken one harms no job, but compares nothing."""
    return _whole("shadow", config.pipeline.shadow, config)


def _whole(check: str, bundle: str, config: Config) -> Finding:
    from pipeline.bundle import bundle_path, load_bundle  # loads torch

    try:
        loaded = load_bundle(bundle_path(bundle, config.pipeline.bundles))
    except BundleError as error:
        return Finding(check=check, verdict=Verdict.FAIL, text=str(error))
    manifest = loaded.manifest
    text = f"{manifest.name} {manifest.version}, {len(loaded.keys)} networks, hashes agree; {manifest.statement}"
    return Finding(check=check, verdict=Verdict.OK, text=text)


def check_device(config: Config) -> Finding:
    """The configured device exists; `auto` without a GPU works and is slower."""
    import torch

    wanted = config.pipeline.device
    if wanted != "cpu" and torch.cuda.is_available():
        index = int(wanted.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            text = f"{wanted} does not exist: this machine has {torch.cuda.device_count()} GPU(s)"
            return Finding(check="device", verdict=Verdict.FAIL, text=text)
        return Finding(check="device", verdict=Verdict.OK, text=torch.cuda.get_device_name(index))
    if wanted.startswith("cuda"):
        return Finding(check="device", verdict=Verdict.FAIL, text=f"{wanted} is configured, but torch finds no GPU")
    text = f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    return Finding(check="device", verdict=Verdict.WARN if wanted == "auto" else Verdict.OK, text=f"no GPU; {text}")


def check_callers(config: Config) -> Finding:
    """Who may send: nobody whom no table names, unless an administrator said so."""
    if config.node.unknown_peers == "accept":
        text = '[node].unknown_peers = "accept": whoever reaches the port may send'
        return Finding(check="callers", verdict=Verdict.WARN, text=text)
    callers = [peer for peer in config.peers if peer.may]
    by_host = [f"{peer.name} ({peer.host})" for peer in callers if not peer.allowed_addresses and addresses_of(peer)]
    unasked = [peer.name for peer in callers if not peer.allowed_addresses and not addresses_of(peer)]
    in_words = [peer.name for peer in callers if peer.allowed_addresses and not addresses_of(peer)]
    text = "only [[peers]] may call"
    if by_host:
        text += f"; from its host alone: {', '.join(by_host)}"
    if in_words:
        text += f"; from any address: {', '.join(in_words)}"
    if unasked:
        text += f"; from any address, as host is a name: {', '.join(unasked)}: fill in allowed_addresses"
    return Finding(check="callers", verdict=Verdict.WARN if unasked else Verdict.OK, text=text)


def check_ways(config: Config) -> Iterator[Finding]:
    """A way in and a way out: without one the node runs, and does nothing."""
    if not config.peers and config.node.unknown_peers == "reject":
        text = "no [[peers]], and strangers are rejected: nobody can send anything"
        yield Finding(check="way in", verdict=Verdict.WARN, text=text)
    if not config.destinations:
        text = "no [[destinations]]: results stay in the outbox, and go nowhere"
        yield Finding(check="way out", verdict=Verdict.WARN, text=text)


def check_certificates(config: Config) -> Iterator[Finding]:
    """The certificates of DICOM TLS can be used, and do not end soon."""
    from dicom_node.net.security import SecurityError, certificates, client_context, server_context

    try:
        if config.tls.cert_file is not None:
            server_context(config.tls)
        for peer in config.peers:
            if peer.tls:
                client_context(peer)
    except SecurityError as error:
        yield Finding(check="tls", verdict=Verdict.FAIL, text=str(error))
        return
    now = utc_now()
    for one in certificates(config):
        fault = one.fault(now, config.tls.warn_days)
        ended = one.ends is None or one.ends <= now
        verdict = Verdict.OK if not fault else Verdict.FAIL if ended else Verdict.WARN
        yield Finding(check="tls", verdict=verdict, text=fault or f"{one.key} is good until {one.ends:%Y-%m-%d}")


def check_peer(config: Config, peer: PeerConfig) -> Finding:
    """C-ECHO to one peer. One that results go to must answer; one that only sends need not listen at all."""
    from dicom_node.net.link import where
    from dicom_node.net.scu import echo

    name, at = f"peer {peer.name}", where(peer)
    outcome = echo(peer, calling_ae=config.node.ae_title)
    if outcome.ok:
        return Finding(check=name, verdict=Verdict.OK, text=f"{at}: answers C-ECHO")
    text = outcome.text if outcome.text.startswith(at) else f"{at}: {outcome.text}"
    if any(destination.peer == peer.name for destination in config.destinations):
        return Finding(check=name, verdict=Verdict.FAIL, text=text)
    if peer.we_may or "commit" in peer.may:
        return Finding(check=name, verdict=Verdict.WARN, text=text)
    return Finding(check=name, verdict=Verdict.OK, text=f"{text}; it only sends to us, so it need not answer")


def check_proof(config: Config, destination: DestinationConfig) -> Finding:
    """The archive offers the services that shall prove deliveries; without one they end earlier, so it only warns."""
    from dicom_node.net.commitment import PUSH_MODEL
    from dicom_node.net.link import Trouble, offered
    from dicom_node.net.query import STUDY_ROOT_FIND

    name = f"proof {destination.name}"
    wanted = {PUSH_MODEL: "Storage Commitment"} if destination.commitment else {}
    wanted |= {STUDY_ROOT_FIND: "C-FIND"} if destination.verify else {}
    answer = offered(config.peer(destination.peer), list(wanted), calling_ae=config.node.ae_title)
    if isinstance(answer, Trouble):
        return Finding(check=name, verdict=Verdict.WARN, text=answer.text)
    missing = " and ".join(what for sop_class, what in wanted.items() if sop_class not in answer)
    if missing:
        return Finding(check=name, verdict=Verdict.WARN, text=f"offers no {missing}: deliveries end without that proof")
    text = f"offers {' and '.join(wanted.values())}"
    if destination.commitment:
        text += f"; its reports must reach {config.node.ae_title} on port {config.node.port}"
    return Finding(check=name, verdict=Verdict.OK, text=text)


def check_retrieve(config: Config, peer: PeerConfig) -> Finding:
    """The archive offers us what `we_may` says; that it knows where to send for C-MOVE, only a pull can prove."""
    from dicom_node.net.link import Trouble, offered
    from dicom_node.net.move import STUDY_ROOT_GET, STUDY_ROOT_MOVE
    from dicom_node.net.query import STUDY_ROOT_FIND

    services = {"find": STUDY_ROOT_FIND, "move": STUDY_ROOT_MOVE, "get": STUDY_ROOT_GET}
    answer = offered(peer, [services[what] for what in peer.we_may], calling_ae=config.node.ae_title)
    name = f"pull from {peer.name}"
    if isinstance(answer, Trouble):
        return Finding(check=name, verdict=Verdict.WARN, text=answer.text)
    missing = " and ".join(f"C-{what.upper()}" for what in peer.we_may if services[what] not in answer)
    if missing:
        return Finding(check=name, verdict=Verdict.WARN, text=f"offers no {missing}")
    text = f"offers {' and '.join(f'C-{what.upper()}' for what in peer.we_may)}"
    if "move" in peer.we_may:
        text += f"; it must know {config.node.ae_title} on port {config.node.port} to send to us"
        if "store" not in peer.may:
            return Finding(check=name, verdict=Verdict.WARN, text=f'{text}, and its may lacks "store" here')
    return Finding(check=name, verdict=Verdict.OK, text=text)


def check_compression(config: Config, destination: DestinationConfig) -> Finding:
    """The archive takes our images in the configured transfer syntax; else they go uncompressed, so it warns."""
    from dicom_node.net.compression import TRANSFER_SYNTAXES
    from dicom_node.net.link import Trouble, offered

    name = f"compression {destination.name}"
    wanted = _image_classes(config, destination)
    syntax = TRANSFER_SYNTAXES[destination.transfer_syntax]
    answer = offered(
        config.peer(destination.peer), list(wanted), calling_ae=config.node.ae_title, syntaxes=[str(syntax)]
    )
    if isinstance(answer, Trouble):
        return Finding(check=name, verdict=Verdict.WARN, text=answer.text)
    declined = " and ".join(what for sop_class, what in wanted.items() if sop_class not in answer)
    if declined:
        text = f"does not accept {syntax.name} for {declined}: sent uncompressed"
        return Finding(check=name, verdict=Verdict.WARN, text=text)
    return Finding(check=name, verdict=Verdict.OK, text=f"accepts {syntax.name} for {' and '.join(wanted.values())}")


def _image_classes(config: Config, destination: DestinationConfig) -> dict[str, str]:
    """SOP class -> its name for a person, of the images that this destination gets and that can be compressed."""
    from pydicom.uid import PositronEmissionTomographyImageStorage, SecondaryCaptureImageStorage

    pet = {str(PositronEmissionTomographyImageStorage): "PET"} if destination.encoding == "pet" else {}
    captures = destination.encoding == "sc" or (config.output.mip and destination.send_mip)
    return pet | ({str(SecondaryCaptureImageStorage): "Secondary Capture"} if captures else {})


def check_web(destination: DestinationConfig) -> Finding:
    """Ask a DICOMweb destination for one study (QIDO-RS): address, certificate and credentials are right."""
    from dicom_node.net.qido import check_service

    name = f"destination {destination.name}"
    failure = check_service(destination)
    if failure is not None and failure.code != "service_not_found":
        return Finding(check=name, verdict=Verdict.FAIL, text=failure.text)
    if failure is not None:  # a service may store and not search; storing would prove it, and a check stores nothing
        text = f"{failure.text}; if it stores without a search, set verify = false"
        return Finding(check=name, verdict=Verdict.WARN if not destination.verify else Verdict.FAIL, text=text)
    text = f"{destination.url} answers a search"
    if destination.verify_tls and not destination.allow_http:
        return Finding(check=name, verdict=Verdict.OK, text=text)
    key = "allow_http = true" if destination.verify_tls else "verify_tls = false"
    text += f"; {key}: whoever is on the way can read and change what is sent"
    return Finding(check=name, verdict=Verdict.WARN, text=text)


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    check_disk,
    check_ledger,
    check_backups,
    check_bundle,
    check_device,
)
