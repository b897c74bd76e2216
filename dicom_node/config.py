"""The only reader of config.toml: one frozen model per table, every key with a default and a rule.

A wrong key, a wrong type or a wrong value is a `ConfigError` that names the key, the value and the rule. Secrets
are never in the file: only paths to them.
"""

from __future__ import annotations

import re
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from pipeline.gate import CHECKS, Severity
from storage.database import default_url

_AE = re.compile(r"^(?! *$)[ -\[\]-~]{1,16}$")  # PS3.5 table 6.2-1, VR AE: 16 characters, no backslash or control
_HEADER = re.compile(r"\s*(\[{1,2})\s*([a-z_]+)\s*[].]")  # of a TOML table, or of one inside it
_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,31}$")


class ConfigError(Exception):
    """The configuration cannot be used; the text has one line per fault: key, value, rule."""


def _ae_title(value: str) -> str:
    if not _AE.match(value) or value != value.strip():
        raise ValueError("an AE title has 1 to 16 printable ASCII characters, no backslash, no outer spaces")
    return value


def _name(value: str) -> str:
    if not _NAME.match(value):
        raise ValueError("a name has 1 to 32 of a-z, 0-9, '-' and '_', and begins with a letter or digit")
    return value


AeTitle = Annotated[str, AfterValidator(_ae_title)]
Name = Annotated[str, AfterValidator(_name)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


def _overlap(host: str, other: str) -> bool:
    """Whether two services that listen on these addresses cannot have the same port."""
    return host == other or bool({host, other} & {"", "0.0.0.0", "::"})


ANY_ADDRESS = "any"  # in a peer's allowed_addresses
_TLS_FILES = ("cert_file", "key_file", "ca_file")
_PEER_FILES = ("ca_file", "client_cert_file", "client_key_file")


def _file_or_none(value: Any) -> Any:
    """What a key for a file holds: the empty text is none."""
    if isinstance(value, str) and not value.isprintable():  # as a certificate that was pasted here
        raise ValueError("the path of a file, in one line")
    return None if value == "" else value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_T = TypeVar("_T", bound=_Table)


class NodeConfig(_Table):
    """[node]: who we are on the network."""

    ae_title: AeTitle = "SYNPET"
    host: str = "0.0.0.0"
    port: Port = 11112
    max_associations: int = Field(default=32, ge=1, le=1000)
    max_connections_per_address: int = Field(default=64, ge=0, le=10_000, description="0: no limit")
    max_pdu: int = Field(default=262144, description="bytes; 0: no limit")
    network_timeout_s: Seconds = 60.0
    acse_timeout_s: Seconds = 30.0
    dimse_timeout_s: Seconds = 60.0
    receiver_processes: int = Field(default=2, ge=0, le=64, description="0: threads of the node's own process")
    sender: Literal["stream", "plain"] = "stream"
    require_called_ae: bool = True
    unknown_peers: Literal["reject", "accept"] = "reject"

    @property
    def associations_of_peers(self) -> int:
        """How many of `max_associations` the peers together have for sure: half, where strangers are let in."""
        return self.max_associations // 2 if self.unknown_peers == "accept" else self.max_associations

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        if isinstance(value, dict) and "require_known_peer" in value:
            now = "accept" if value["require_known_peer"] is False else "reject"
            raise ValueError(f'require_known_peer has another name now: write unknown_peers = "{now}"')
        return value

    @field_validator("max_pdu")
    @classmethod
    def _pdu(cls, value: int) -> int:
        if value != 0 and not 4096 <= value <= 16_777_216:
            raise ValueError("0 (no limit) or 4096 to 16777216 bytes")
        return value


class PeerConfig(_Table):
    """[[peers]]: a remote AE, what it may do, and where it is."""

    name: Name
    ae_title: AeTitle
    host: str = "127.0.0.1"
    port: Port = 104
    may: tuple[Literal["store", "echo", "commit"], ...] = ("store", "echo")
    we_may: tuple[Literal["find", "move", "get"], ...] = ()
    allowed_addresses: tuple[str, ...] = Field(default=(), description='IP addresses, CIDR or "any"; empty: its host')
    max_associations: int = Field(default=0, ge=0, le=1000, description="0: what leaves places to other peers")
    must_call_by_tls: bool = False
    tls: bool = False
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    check_host_name: bool = True

    @field_validator(*_PEER_FILES, mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        return _file_or_none(value)

    @model_validator(mode="after")
    def _tls_keys_agree(self) -> Self:
        if not self.tls and any(getattr(self, key) for key in _PEER_FILES):
            raise ValueError("ca_file, client_cert_file and client_key_file are for tls = true")
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file is the key of a client_cert_file")
        return self

    @field_validator("allowed_addresses")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if ANY_ADDRESS in value and len(value) > 1:
            raise ValueError(f'"{ANY_ADDRESS}" stands alone')
        for address in value:
            if address != ANY_ADDRESS:
                ip_network(address, strict=False)
        return value


class TlsConfig(_Table):
    """[tls]: the port that speaks DICOM TLS (PS3.15 annex B.12); none without a `cert_file`."""

    port: Port = 2762
    cert_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    client_certificates: Literal["none", "optional", "required"] = "required"
    min_version: Literal["1.2", "1.3"] = "1.2"
    warn_days: int = Field(default=30, ge=0, le=3650)

    @field_validator(*_TLS_FILES, mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        return _file_or_none(value)

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.cert_file is None and (self.key_file or self.ca_file):
            raise ValueError("key_file and ca_file are for a cert_file, without which there is no TLS")
        if self.cert_file is not None and self.client_certificates != "none" and self.ca_file is None:
            raise ValueError(
                f'client_certificates = "{self.client_certificates}" needs the ca_file that signed them; '
                'write "none" to ask for no certificate'
            )
        return self


class IntakeConfig(_Table):
    """[intake]: when a series and a study count as complete, and what is refused before it is lost."""

    quiet_period_s: Seconds = 30.0
    study_quiet_period_s: Seconds = 90.0
    incomplete_after_s: Seconds = 600.0
    scan_interval_s: Seconds = 1.0
    min_free_bytes: int = Field(default=5_000_000_000, ge=0)
    max_instances_per_series: int = Field(default=5000, ge=1)
    max_instance_bytes: int = Field(default=2_000_000_000, ge=1_000_000)
    min_bytes_per_s: int = Field(default=1000, ge=0, description="0: a sender may be as slow as it likes")
    max_bytes_per_s: int = Field(default=0, ge=0, description="of each peer; 0: no limit")
    other_classes: Literal["drop", "refuse"] = "drop"
    reader: Literal["stream", "plain"] = "stream"
    sync: bool = True


class RuleConfig(_Table):
    """[[rules]]: what to do with a series; every condition that is set must hold; the first match wins.

    Text conditions are shell-style patterns (`*`, `?`), compared without case; never evaluated as code.
    """

    name: Name
    action: Literal["synthesize", "ignore", "hold"]
    modality: str = ""
    series_description: str = ""
    study_description: str = ""
    body_part: str = ""
    convolution_kernel: str = ""
    image_type: str = ""
    manufacturer: str = ""
    calling_ae: str = ""
    min_slices: int = Field(default=0, ge=0)
    max_slices: int = Field(default=0, ge=0, description="0: no limit")
    min_coverage_mm: float = Field(default=0.0, ge=0)
    max_slice_spacing_mm: float = Field(default=0.0, ge=0, description="0: no limit")


class SelectionConfig(_Table):
    """[selection]: the built-in choice for series that no rule names: one CT per study."""

    min_slices: int = Field(default=20, ge=2)
    min_coverage_mm: float = Field(default=120.0, ge=0)
    max_slice_spacing_mm: float = Field(default=10.0, gt=0)


class PipelineConfig(_Table):
    """[pipeline]: how a volume is made."""

    bundle: str = "phantom"  # the name of a shipped or installed bundle, or a folder
    bundles: Path = Path("bundles")  # where `models install` puts them
    shadow: str = ""  # a second bundle, only compared; empty: none
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    batch: int = Field(default=0, ge=0, le=4096)
    blending: Literal["bundle", "mean", "gaussian"] = "bundle"
    stitching: Literal["bundle", "hard", "feathered"] = "bundle"
    districts: tuple[Literal["dicom_seg", "nnunet_folder", "totalsegmentator", "builtin"], ...] = ("builtin",)
    nnunet_folder: str = ""  # an unzipped nnU-Net v2 model folder; relative: to the file's folder
    totalsegmentator_weights: str = ""  # empty: where TotalSegmentator itself looks
    segmenter_timeout_s: Seconds = 900.0
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    low_confidence: Literal["whole_body", "not_evaluated"] = "whole_body"
    threads: int = Field(default=0, ge=0, le=1024)

    @property
    def uses_segmentations(self) -> bool:
        """Whether SEG objects of a study are wanted beside its CT."""
        return "dicom_seg" in self.districts

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("one of auto, cpu, cuda, cuda:N")
        return value


class GateConfig(_Table):
    """[gate]: what is checked before a network runs, and before anything is sent (docs/gates.md)."""

    min_coverage_mm: float = Field(default=120.0, ge=0)
    max_slices: int = Field(default=3000, ge=2)
    max_slice_spacing_mm: float = Field(default=10.0, gt=0)
    body_mm: tuple[float, float] = (120.0, 600.0)
    required_districts: tuple[Literal["head", "trunk", "arms", "legs"], ...] = ("trunk",)
    min_age_years: int = Field(default=18, ge=0, le=120)
    max_cut_share: float = Field(default=0.05, ge=0, le=1)
    max_metal_share: float = Field(default=0.005, ge=0, le=1)
    max_hu_distance: float = Field(default=0.35, ge=0, le=1)
    max_lung_suv: float = Field(default=1.5, gt=0)
    max_bone_suv: float = Field(default=3.0, gt=0)
    suv_factor: float = Field(default=2.0, ge=1)
    max_seam: float = Field(default=2.0, ge=1)
    max_asymmetry: float = Field(default=0.5, ge=0, le=2)
    max_not_evaluated: float = Field(default=0.5, ge=0, le=1)
    severity: dict[str, Severity] = {}

    @field_validator("body_mm")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("a lower and a higher size in mm")
        return value

    @field_validator("severity")
    @classmethod
    def _known_checks(cls, value: dict[str, Severity]) -> dict[str, Severity]:
        for code, severity in value.items():
            if code not in CHECKS:
                raise ValueError(f"no check of a gate is called {code!r}; docs/gates.md lists them")
            allowed = CHECKS[code].allowed
            if severity not in allowed:
                raise ValueError(f"{code} can be {' or '.join(allowed)}, not {severity.value}")
        return value


class OutputConfig(_Table):
    """[output]: the result series."""

    mip: bool = True
    seg: bool = False
    uncertainty: bool = False
    sr: bool = False
    presentation_states: bool = False
    series_number: int = Field(default=9001, ge=1, le=2_000_000_000)
    uncertainty_series_number: int = Field(default=9010, ge=1, le=2_000_000_000)
    seg_series_number: int = Field(default=9020, ge=1, le=2_000_000_000)
    mip_series_number: int = Field(default=9030, ge=1, le=2_000_000_000)
    sr_series_number: int = Field(default=9040, ge=1, le=2_000_000_000)
    gsps_series_number: int = Field(default=9050, ge=1, le=2_000_000_000)
    pcps_series_number: int = Field(default=9060, ge=1, le=2_000_000_000)
    series_description: str = Field(default="SYNTHETIC FDG PET SUVbw - AI, RESEARCH ONLY", max_length=64)
    institution_name: str = Field(default="", max_length=64)
    emit_patient_position: bool = False
    emit_sc_markers: bool = False
    omit_patient_size: bool = False

    @field_validator("series_description")
    @classmethod
    def _synthetic_first(cls, value: str) -> str:
        if not value.startswith("SYNTHETIC"):
            raise ValueError("must begin with the word SYNTHETIC: viewers cut the description off")
        if "\\" in value:
            raise ValueError("no backslash")
        return value


_WEB_FILES = ("password_file", "token_file", "ca_file", "client_cert_file", "client_key_file")


class WebConfig(_Table):
    """The keys of a destination that is a DICOMweb service (docs/dicomweb.md). Secrets are files, read at each use."""

    url: str = ""
    username: str = ""
    password_file: Path | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    verify_tls: bool = True
    allow_http: bool = False
    connect_timeout_s: Seconds = 10.0
    upload_timeout_s: Seconds = 600.0
    answer_timeout_s: Seconds = 60.0
    batch_bytes: int = Field(default=32_000_000, ge=1_000_000, le=1_000_000_000)

    @field_validator("url")
    @classmethod
    def _service(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:  # its text repeats the value, and so a password
            raise ValueError("not an address; a port is 1 to 65535") from None
        if value and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("the address of a DICOMweb service begins with https:// (or http://) and a host")
        if port == 0:
            raise ValueError("a port is 1 to 65535")
        if value.rstrip("/").endswith("/studies"):
            raise ValueError("the service's address, without /studies")
        return value.rstrip("/")

    @field_validator(*_WEB_FILES, mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return _file_or_none(value)

    @model_validator(mode="after")
    def _web_keys_agree(self) -> Self:
        if not self.url:
            for key in sorted(self.model_fields_set & WebConfig.model_fields.keys()):
                if getattr(self, key) != WebConfig.model_fields[key].default:
                    raise ValueError(f"{key} is for a destination with a url")
        address = urlsplit(self.url)
        if address.username is not None or address.query or address.fragment:  # here, where the value is not shown
            raise ValueError("no user, query or fragment in the url: use username and password_file, or token_file")
        if bool(self.username) != bool(self.password_file):
            raise ValueError("username and password_file belong together")
        if self.username and self.token_file:
            raise ValueError("either username and password_file, or token_file")
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file is the key of a client_cert_file")
        if self.ca_file and not self.verify_tls:
            raise ValueError(
                "ca_file says whom to trust, and verify_tls = false trusts everybody: leave one of them out"
            )
        if address.scheme == "http":
            for key in ("ca_file", "client_cert_file", "client_key_file", "verify_tls"):
                if getattr(self, key) != WebConfig.model_fields[key].default:
                    raise ValueError(f"{key} is for https, and the url is plain http")
        if address.scheme == "http" and not self.allow_http and not _is_loopback(address.hostname):
            raise ValueError("patient data over plain http: use https, or say allow_http = true")
        return self


class DestinationConfig(WebConfig):
    """[[destinations]]: where results go: to a peer by DIMSE, or to a url by DICOMweb."""

    name: Name
    peer: str = ""
    encoding: Literal["sc", "pet"] = "sc"
    transfer_syntax: Literal["explicit", "rle", "jpeg-ls", "htj2k", "j2k"] = "explicit"
    send_mip: bool = True
    send_seg: bool = True
    send_uncertainty: bool = True
    send_sr: bool = True
    send_presentation_states: bool = True
    reject_superseded: bool = False
    commitment: bool = False
    commitment_timeout_s: Seconds = 3600.0
    verify: bool = True
    max_attempts: int = Field(default=12, ge=1)
    give_up_after_days: float = Field(default=7.0, gt=0, le=365)
    first_retry_s: Seconds = 30.0
    max_retry_s: Seconds = 3600.0

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.peer) == bool(self.url):
            raise ValueError("a destination has either a peer (DIMSE) or a url (DICOMweb)")
        if self.commitment and self.url:
            raise ValueError("commitment is a DIMSE service: a url has none, and verify counts by QIDO-RS")
        if self.transfer_syntax != "explicit" and self.url:
            raise ValueError("transfer_syntax is negotiated over DIMSE: a url gets the files as they are")
        return self


class EngineConfig(_Table):
    """[engine]: the process that owns the GPU."""

    kind: Literal["local"] = "local"
    max_attempts: int = Field(default=3, ge=1, le=20)
    retry_s: Seconds = 30.0
    lease_s: Seconds = 120.0
    job_timeout_s: Seconds = 3600.0


class StorageConfig(_Table):
    """[storage]: the spool, the ledger, and how long things stay."""

    root: Path = Path("spool")
    database_url: str = ""  # empty: sqlite in root
    keep_inputs_days: float = Field(default=7.0, ge=0)
    keep_results_days: float = Field(default=30.0, ge=0)
    keep_events_days: float = Field(default=365.0, ge=0)
    backup_folder: str = ""  # empty: backups in root
    keep_backups: int = Field(default=14, ge=0, description="0: no backups")
    backup_at: str = "02:30"

    @field_validator("backup_at")
    @classmethod
    def _time_of_day(cls, value: str) -> str:
        if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
            raise ValueError("a time of day from 00:00 to 23:59")
        return value


class CommitmentConfig(_Table):
    """[commitment]: how long a peer that asked us for Storage Commitment is told again."""

    first_retry_s: Seconds = 30.0
    max_retry_s: Seconds = 3600.0
    max_attempts: int = Field(default=12, ge=1)


class PullConfig(_Table):
    """[pull]: how long an archive is listened to that fetches a series for us (C-MOVE, C-GET)."""

    answer_timeout_s: Seconds = 300.0
    series_timeout_s: Seconds = 3600.0


class ScheduledPull(_Table):
    """[[pulls]]: every day, what a peer has and nobody sent us. Patterns are those of [[rules]]; empty: any."""

    name: Name
    peer: str
    at: str = "03:00"
    days_back: int = Field(default=1, ge=1, le=366)
    method: Literal["move", "get"] = "move"
    study_description: str = ""
    series_description: str = ""
    station_name: str = ""
    max_studies: int = Field(default=500, ge=1)

    @field_validator("at")
    @classmethod
    def _time_of_day(cls, value: str) -> str:
        if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
            raise ValueError("a time of day, as 03:00")
        return value


class LogConfig(_Table):
    """[log]: where one line per stage goes."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class MetricsConfig(_Table):
    """[metrics]: figures for Prometheus (docs/metrics.md); they hold no patient's data."""

    port: int = Field(default=0, ge=0, le=65535, description="0: off")
    host: str = "127.0.0.1"


class Config(_Table):
    """The whole file."""

    node: NodeConfig = NodeConfig()
    tls: TlsConfig = TlsConfig()
    peers: tuple[PeerConfig, ...] = ()
    intake: IntakeConfig = IntakeConfig()
    rules: tuple[RuleConfig, ...] = ()
    selection: SelectionConfig = SelectionConfig()
    pipeline: PipelineConfig = PipelineConfig()
    gate: GateConfig = GateConfig()
    output: OutputConfig = OutputConfig()
    destinations: tuple[DestinationConfig, ...] = ()
    engine: EngineConfig = EngineConfig()
    storage: StorageConfig = StorageConfig()
    commitment: CommitmentConfig = CommitmentConfig()
    pull: PullConfig = PullConfig()
    pulls: tuple[ScheduledPull, ...] = ()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for what, names in (
            ("peers", [p.name for p in self.peers]),
            ("destinations", [d.name for d in self.destinations]),
            ("rules", [r.name for r in self.rules]),
            ("pulls", [p.name for p in self.pulls]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what}: the name {twice[0]!r} is used twice")
        for peer in self.peers:
            if peer.must_call_by_tls and self.tls.cert_file is None:
                raise ValueError(f"peers.{peer.name}.must_call_by_tls: without [tls].cert_file nobody can")
        known = {p.name for p in self.peers}
        for destination in self.destinations:
            if destination.peer and destination.peer not in known:
                raise ValueError(f"destinations.{destination.name}.peer: no peer is named {destination.peer!r}")
        for pull in self.pulls:
            if pull.peer not in known:
                raise ValueError(f"pulls.{pull.name}.peer: no peer is named {pull.peer!r}")
            missing = {"find", pull.method}.difference(self.peer(pull.peer).we_may)
            if missing:
                wanted = " and ".join(sorted(missing))
                raise ValueError(f"pulls.{pull.name}: the peer {pull.peer!r} lacks {wanted} in its we_may")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        """[tls].port may be [node].port: then the node speaks nothing but TLS."""
        if _overlap(self.metrics.host, self.node.host):
            for key, port in (("[node].port", self.node.port), ("[tls].port", self.tls.cert_file and self.tls.port)):
                if port and self.metrics.port == port:
                    raise ValueError(f"[metrics].port = {port}: is {key} too; one port is for one service")
        return self

    @property
    def tls_alone(self) -> bool:
        """Whether the node speaks nothing but TLS: its port is the TLS port."""
        return self.tls.cert_file is not None and self.tls.port == self.node.port

    @property
    def ledger_url(self) -> str:
        """The ledger's database: what is configured, else an SQLite file in the storage root."""
        return self.storage.database_url or default_url(self.storage.root)

    @property
    def has_ledger_file(self) -> bool:
        """Whether the ledger is a SQLite file, which the node itself checks and backs up."""
        return re.match(r"sqlite(\+\w+)?:///(?!file:|:)", self.ledger_url) is not None

    @property
    def asks_commitment(self) -> bool:
        """Whether archives may bring Storage Commitment reports: some destination is asked for them."""
        return any(destination.commitment for destination in self.destinations)

    @property
    def gives_commitment(self) -> bool:
        """Whether some peer may ask us for Storage Commitment."""
        return any("commit" in peer.may for peer in self.peers)

    @property
    def places_for_peers(self) -> int:
        """How many of `[node].max_associations` callers that are no peer cannot have: half, where any are let in."""
        strangers = self.peers and self.node.unknown_peers == "accept"
        return self.node.associations_of_peers if strangers else 0

    def peer(self, name: str) -> PeerConfig:
        """The peer with this name; a destination's peer, if it has one, always exists."""
        return next(p for p in self.peers if p.name == name)


def load_config(path: Path) -> Config:
    """Read and check a configuration file.

    Relative paths in it are taken from the folder of the file, so that the node does not depend on where it was
    started.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}{_wrong_brackets(text)}") from error
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _fault_lines(error, raw))) from error
    return _with_absolute_paths(config, path.resolve().parent)


def _with_absolute_paths(config: Config, base: Path) -> Config:
    """Take every relative path from `base`: a bundle only where such a folder is, else it is a name."""

    def folder(path: str) -> str:
        return str((base / path).resolve()) if path else ""

    storage = config.storage.model_copy(
        update={
            "root": (base / config.storage.root).resolve(),
            "backup_folder": folder(config.storage.backup_folder),
            "database_url": re.sub(
                r"^(sqlite(?:\+\w+)?:///)(?!/)(?=.)", lambda found: f"{found[1]}{base}/", config.storage.database_url
            ),
        }
    )

    def folder_or_name(bundle: str) -> str:
        return str(base / bundle) if bundle and (base / bundle).is_dir() else bundle

    pipeline = config.pipeline.model_copy(
        update={
            "bundle": folder_or_name(config.pipeline.bundle),
            "bundles": (base / config.pipeline.bundles).resolve(),
            "shadow": folder_or_name(config.pipeline.shadow),
            "nnunet_folder": folder(config.pipeline.nnunet_folder),
            "totalsegmentator_weights": folder(config.pipeline.totalsegmentator_weights),
        }
    )
    found: dict[str, Any] = {"storage": storage, "pipeline": pipeline}
    found["tls"] = _with_absolute_files(config.tls, _TLS_FILES, base)
    found["destinations"] = tuple(_with_absolute_files(one, _WEB_FILES, base) for one in config.destinations)
    found["peers"] = tuple(_with_absolute_files(peer, _PEER_FILES, base) for peer in config.peers)
    return config.model_copy(update=found)


def _with_absolute_files(table: _T, keys: tuple[str, ...], base: Path) -> _T:
    files = {key: getattr(table, key) for key in keys}
    return table.model_copy(update={key: (base / path).resolve() for key, path in files.items() if path})


def _wrong_brackets(text: str) -> str:
    """Where a table is written with one bracket and with two, or "": TOML only says that it is declared twice."""
    headers = [
        (number, len(found[1]), found[2])
        for number, line in enumerate(text.splitlines(), 1)
        if (found := _HEADER.match(line)) and found[2] in Config.model_fields
    ]
    for number, brackets, table in headers:
        both = len({count for _, count, name in headers if name == table}) == 2
        if both and (brackets == 2) != _is_list_of_tables(table):
            return f"; line {number}: write {_header(table)}"
    return ""


def _is_list_of_tables(table: str) -> bool:
    return get_origin(Config.model_fields[table].annotation) is tuple


def _header(table: str) -> str:
    return f"[[{table}]], with two brackets" if _is_list_of_tables(table) else f"[{table}], with one bracket"


def _rule(fault: ErrorDetails) -> str:
    """What pydantic found wrong, in this file's words where its own are about Python."""
    if fault["type"] in ("tuple_type", "model_type") and len(fault["loc"]) == 1:
        table = str(fault["loc"][0])
        return f"there {'may be several' if _is_list_of_tables(table) else 'is only one'}: write {_header(table)}"
    if fault["type"] == "tuple_type":
        return "write a list, in brackets: [...]"
    return fault["msg"].removeprefix("Value error, ")


def _fault_lines(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    lines = []
    for fault in error.errors():
        key = _key(fault["loc"], raw)
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key} is not a key; {_near(fault['loc'])}")
        else:
            shown = f" = {fault['input']!r}" if _may_be_shown(fault["loc"], fault["input"]) else ""
            lines.append(f"{key}{shown}: {_rule(fault)}" if key else _rule(fault))
    return lines


def _may_be_shown(loc: tuple[int | str, ...], value: Any) -> bool:
    """Whether a wrong value can hold no secret: an address can have a password or a token in it, a table any key."""
    key = str(loc[-1]) if loc else ""
    if isinstance(value, dict | list) or any(word in key for word in ("password", "token", "secret")):
        return False
    if key in _WEB_FILES or key in _TLS_FILES:
        return False
    return not ("url" in key and re.search("[@?#]", str(value)))


def _key(loc: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    """`peers[0].port`, or `[peers.pacs].port` where the item has a name."""
    if len(loc) >= 2 and isinstance(loc[1], int):
        table = str(loc[0])
        try:
            item = f"[{table}.{raw[table][loc[1]]['name']}]"
        except (KeyError, IndexError, TypeError):
            item = f"{table}[{loc[1]}]"
        rest = [str(part) for part in loc[2:]]
        return ".".join([item, *rest])
    if len(loc) >= 2:
        return f"[{loc[0]}].{'.'.join(str(part) for part in loc[1:])}"
    return str(loc[0]) if loc else ""


def _near(loc: tuple[int | str, ...]) -> str:
    """Name the closest existing key, so that a misspelling is mended at once."""
    import difflib

    model: Any = Config
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            model = getattr(annotation, "__args__", (annotation,))[0]
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
