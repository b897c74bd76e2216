"""A destination that is a DICOMweb service: what the configuration takes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.config import ConfigError, DestinationConfig, load_config

URL = 'url = "https://pacs.example/dicom-web/"'
PEER = '[[peers]]\nname = "pacs"\nae_title = "PACS"\n'
REFUSED = {
    "neither a peer nor a url": ("", "[destinations.web]: a destination has either a peer (DIMSE) or a url (DICOMweb)"),
    "both": (f'{URL}\npeer = "pacs"', "either a peer (DIMSE) or a url (DICOMweb)"),
    "a web key without a url": ('peer = "pacs"\nusername = "node"', "username is for a destination with a url"),
    "no scheme": ('url = "pacs.example/dicom-web"', "begins with https://"),
    "another scheme": ('url = "ftp://pacs.example"', "begins with https://"),
    "a port that is none": ('url = "https://pacs.example:99999"', "[destinations.web].url"),
    "the resource instead of the service": ('url = "https://pacs.example/studies"', "without /studies"),
    "a query": (URL.replace('/"', '?x=1"'), "no user, query or fragment in the url"),
    "plain http to another machine": ('url = "http://pacs.example/dicom-web"', "patient data over plain http"),
    "plain http in capitals": ('url = "HTTP://pacs.example/dicom-web"', "patient data over plain http"),
    "a user without a password": (f'{URL}\nusername = "node"', "username and password_file belong together"),
    "a password without a user": (f'{URL}\npassword_file = "p"', "username and password_file belong together"),
    "a password and a token": (
        f'{URL}\nusername = "node"\npassword_file = "p"\ntoken_file = "t"',
        "either username and password_file, or token_file",
    ),
    "a key without its certificate": (f'{URL}\nclient_key_file = "k"', "client_key_file is the key of"),
    "a CA and no verification": (f'{URL}\nca_file = "c"\nverify_tls = false', "verify_tls = false trusts everybody"),
    "a CA for plain http": ('url = "http://localhost"\nca_file = "c"', "ca_file is for https"),
    "a certificate for plain http": (
        'url = "http://localhost"\nclient_cert_file = "c"',
        "client_cert_file is for https",
    ),
    "no verification of plain http": ('url = "http://localhost"\nverify_tls = false', "verify_tls is for https"),
    "a password in the file": (f'{URL}\npassword = "secret"', "did you mean 'password_file'?"),
    "tiny batches": (f"{URL}\nbatch_bytes = 10", "[destinations.web].batch_bytes = 10"),
}


def load(folder: Path, keys: str) -> DestinationConfig:
    path = folder / "config.toml"
    path.write_text(f'{PEER}[[destinations]]\nname = "web"\n{keys}\n', encoding="utf-8")
    return load_config(path).destinations[0]


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_web_destination_is_refused_with_the_rule(case: str, tmp_path: Path) -> None:
    keys, expected = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, keys)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('url = "https://node:s3cret@pacs.example/dicom-web"', "no user"),
        ('url = "ftp://node:s3cret@pacs.example/dicom-web"', "begins with https://"),
        ('url = "node:s3cret@pacs.example/dicom-web"', "begins with https://"),
        ('url = "https://node:s3cret@pacs.example/studies"', "without /studies"),
        ('url = "https://node:s3cret@pacs.example:99999"', "not an address"),
        ('url = "https://node:s3cret/@pacs.example"', "not an address"),  # its "port" is the password
        ('url = "https://node:s3cret@[pacs.example"', "not an address"),
        ('url = "ftp://pacs.example?token=s3cret"', "begins with https://"),
        (f'{URL}\ntoken_file = ["s3cret"]', "token_file"),
        (
            f'{URL}\nclient_cert_file = "c"\nclient_key_file = """-----BEGIN\ns3cret"""',
            "client_key_file: the path of a file",
        ),
        (f'{URL}\ntoken_file = "s3cret\\u0000"', "token_file: the path of a file"),
    ],
)
def test_a_secret_of_a_wrong_destination_is_refused_and_not_repeated(keys: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(tmp_path, keys)
    assert "s3cret" not in str(caught.value)


def test_a_wrong_address_without_a_secret_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ftp://pacs\.example"):
        load(tmp_path, 'url = "ftp://pacs.example"')


def test_secrets_are_files_beside_the_configuration(tmp_path: Path) -> None:
    made = load(tmp_path, f'{URL}\nusername = "node"\npassword_file = "secrets/pacs"\nca_file = "/etc/ssl/ca.pem"')
    assert made.password_file == tmp_path / "secrets" / "pacs"
    assert made.ca_file == Path("/etc/ssl/ca.pem")
    assert (made.url, made.token_file) == ("https://pacs.example/dicom-web", None)


@pytest.mark.parametrize("host", ["localhost:8042", "127.0.0.1:8042", "[::1]:8042"])
def test_plain_http_is_for_this_machine(host: str, tmp_path: Path) -> None:
    assert load(tmp_path, f'url = "http://{host}/dicom-web"').url.startswith("http://")


def test_plain_http_to_another_machine_has_to_be_said(tmp_path: Path) -> None:
    assert load(tmp_path, 'url = "http://pacs.example/dicom-web"\nallow_http = true').allow_http
