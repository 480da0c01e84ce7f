"""The store while another thread is still importing the driver."""

import psycopg2.errors
import pytest

from clinical_orchestration.platform.crypto import Cipher
from clinical_orchestration.platform.store import PlatformStore, StoreUnavailableError


def test_error_classes_that_the_driver_has_not_filled_in_yet_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    # the driver's C part fills this module late: a second thread finds it in sys.modules and still empty
    monkeypatch.delattr(psycopg2.errors, "UndefinedTable")
    store = PlatformStore("postgresql://127.0.0.1:9/nothing", Cipher(""))
    with pytest.raises(StoreUnavailableError):
        store.variables()
