import pytest

from alpro_sharding.ledger import Ledger
from alpro_stream.errors import ShardError


def test_a_plan_under_which_nothing_was_made_may_be_replaced(tmp_path):
    with Ledger(tmp_path, {"manifest_sha256": "wrong"}) as ledger:
        ledger.directory("train")
        ledger.result_path("train", "video-000000").write_text("{}")
    with Ledger(tmp_path, {"manifest_sha256": "corrected"}) as ledger:
        assert not ledger.result_path("train", "video-000000").exists()
    with Ledger(tmp_path, {"manifest_sha256": "corrected"}):
        pass


def test_a_plan_with_shards_is_kept(tmp_path):
    with Ledger(tmp_path, {"manifest_sha256": "old"}) as ledger:
        (ledger.directory("train") / "video-000000.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="'old' != 'new'"):
        Ledger(tmp_path, {"manifest_sha256": "new"})
