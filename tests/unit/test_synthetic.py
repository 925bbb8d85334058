"""The study that shows every figure: it has every ending, and says that nothing of it was measured."""

from collections import Counter

from benchmarks import synthetic

from finetune_study import config as config_module
from finetune_study.record import STATUSES, Failure, Record


def test_every_status_occurs_and_those_not_tried_say_why() -> None:
    found = [one for _, one in synthetic.records(config_module.parse(synthetic.settings()))]
    records = [one for one in found if isinstance(one, Record)]
    counts = Counter(one.ending.status for one in records)
    assert {*counts} == {*STATUSES}
    assert min(counts.values()) >= 10
    assert any(isinstance(one, Failure) for one in found)
    assert None in found
    by_id = {one.run.run_id: one for one in records}
    for one in records:
        if one.ending.status == "implied_oom":
            assert one.ending.witness is not None
            witness = by_id[one.ending.witness]
            assert (witness.ending.status, witness.run.recipe) == ("device_oom", one.run.recipe)
            assert witness.run.sequence_length <= one.run.sequence_length
        if one.ending.status == "predicted_oom":
            assert "are predicted, the device has" in str(one.ending.reason)
