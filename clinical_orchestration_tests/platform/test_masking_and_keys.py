"""What is a secret, how it is shown, and how it is encrypted."""

from __future__ import annotations

import json
import logging

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.platform.crypto import Cipher, SecretKeyError, new_key
from clinical_orchestration.platform.masking import MASK, is_sensitive, mask_url, redact

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    "name",
    ["password", "db_password", "SECRET_KEY", "aws_secret_access_key", "api-key", "apikey", "access_token", "TOKEN",
     "private_key", "passphrase", "passwd", "authorization", "slack_webhook_url", "sasl.password", "keyfile_dict"],
)  # fmt: skip
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_sensitive(name)


@pytest.mark.parametrize("name", ["model_name", "clinical_data_bucket", "alert_email_recipients", "host", "region"])
def test_names_of_other_values_are_not_secrets(name: str) -> None:
    assert not is_sensitive(name)


def test_secrets_are_replaced_at_any_depth() -> None:
    shown = redact({"a": [{"token": SECRET}], "password": SECRET, "url": f"redis://me:{SECRET}@host/0", "n": 1})
    assert SECRET not in json.dumps(shown)
    assert shown["n"] == 1
    assert shown["url"] == f"redis://me:{MASK}@host/0"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:p@h:1/d", "postgresql://u:***@h:1/d"),
        ("redis://:p@h", "redis://:***@h"),
        ("http://h:80/path:x@y", "http://h:80/path:x@y"),
        ("two https://a:b@c and ftp://d:e@f", "two https://a:***@c and ftp://d:***@f"),
    ],
)
def test_passwords_in_urls_are_replaced(text: str, shown: str) -> None:
    assert mask_url(text) == shown


@given(st.text())
def test_what_is_encrypted_is_read_back(text: str) -> None:
    cipher = Cipher(KEY)
    token = cipher.encrypt(text, "x")
    assert cipher.decrypt(token, "x") == text
    assert not text or text not in token or len(text) < 8


KEY = new_key()


def test_a_new_key_is_a_fernet_key() -> None:
    Fernet(new_key().encode())
    assert new_key() != new_key()


def test_rotation_needs_the_old_key_only_until_it_is_done() -> None:
    old, new = new_key(), new_key()
    token = Cipher(old).encrypt(SECRET, "x")
    both = Cipher(f"{new}, {old}")

    assert both.decrypt(token, "x") == SECRET
    rotated = both.rotate(token, "x")

    assert Cipher(new).decrypt(rotated, "x") == SECRET
    with pytest.raises(SecretKeyError):
        Cipher(old).decrypt(rotated, "x")


def test_a_missing_key_says_so_and_what_to_do() -> None:
    with pytest.raises(SecretKeyError, match=r"the variable token is a secret.*set CLINICAL_FERNET_KEY") as raised:
        Cipher("").encrypt(SECRET, "the variable token")
    assert SECRET not in str(raised.value)


def test_a_broken_key_is_named_by_its_place_and_not_shown() -> None:
    with pytest.raises(SecretKeyError, match="key 2 in CLINICAL_FERNET_KEY is not a Fernet key") as raised:
        Cipher(f"{KEY},broken-key-value").encrypt(SECRET, "x")
    assert "broken-key-value" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_another_key_says_which_value_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    token = Cipher(new_key()).encrypt(SECRET, "x")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(SecretKeyError, match=r"the password of kafka was encrypted with another key.*add the old key"),
    ):
        Cipher(KEY).decrypt(token, "the password of kafka")
    assert SECRET not in caplog.text
