from alpro_sharding.ledger import Ledger


def test_a_plan_under_which_nothing_was_made_may_be_replaced(tmp_path):
    with Ledger(tmp_path, {"manifest_sha256": "wrong"}) as ledger:
        ledger.directory("train")
        ledger.result_path("train", "video-000000").write_text("{}")
    with Ledger(tmp_path, {"manifest_sha256": "corrected"}) as ledger:
        assert not ledger.result_path("train", "video-000000").exists()
    with Ledger(tmp_path, {"manifest_sha256": "corrected"}):
        pass
