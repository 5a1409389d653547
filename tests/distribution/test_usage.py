"""What `ExpertUsage` sees on several devices is what it sees on one."""

import numpy as np
import pytest

from tests.distribution import children


@pytest.mark.slow
def test_the_use_of_experts_is_summed_over_the_replicas():
    one, several = children.run("usage_child", {"devices": 2})
    assert [record[0] for record in one["records"]["train"]] == [2, 3]
    for split, records in one["records"].items():
        assert len(records) == len(several["records"][split]) > 0
        for expected, found in zip(records, several["records"][split], strict=True):
            assert found[0] == expected[0]
            for a, b in zip(expected[1:], found[1:], strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-5)
    # 2 steps of 24 sequences of 6 tokens, 2 experts each: of the global batch.
    assert sum(one["records"]["train"][0][2]) == 2 * 24 * 6 * 2
    assert one["logs"].keys() == several["logs"].keys()
    for name, values in one["logs"].items():
        np.testing.assert_allclose(several["logs"][name], values, rtol=1e-4), name
