"""One process with a whole batch, two with half each and four with a quarter each train the same model."""

import pytest
import torch

from tests.helpers.checkout import run
from tests.helpers.layouts import CASES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    outputs = {}
    for processes in (1, 2, 4):
        path = folder / f"{processes}.pt"
        script = "tests/helpers/layouts.py"
        result = run(script, path, launch=processes)  # one too: the script changes the default dtype of its process
        assert result.returncode == 0, result.stderr
        outputs[processes] = torch.load(path)
    assert all(value.dtype != torch.float32 for results in outputs[1]["results"].values() for value in results.values())
    return outputs


def describe(case):
    name, settings, amortizer_config = case
    return "-".join(map(str, (name, *settings.values(), *amortizer_config.values())))


@pytest.mark.parametrize("case", CASES, ids=describe)
@pytest.mark.parametrize("processes, micro_batches", [(1, True), (2, False), (2, True), (4, True)])
@pytest.mark.e2e
def test_same_parameters_and_state(trained, case, processes, micro_batches):
    reference = trained[1]["results"][repr((case, False))]
    result = trained[processes]["results"][repr((case, micro_batches))]
    assert result.keys() == reference.keys()
    for name, expected in reference.items():
        seen = expected.isfinite()  # estimates of samples never seen are -inf in all layouts
        assert torch.equal(seen, result[name].isfinite()), name
        error, size = (value[seen].double().norm() for value in (result[name] - expected, expected))
        # The absolute part is for attention's key biases, whose true gradient is 0. Layouts differ by rounding, 1e-14
        # of the size, and by 1e-4 when one of them is wrong, as with a loss that counts the pairs of one process only.
        assert error <= 1e-9 * size + 1e-11 * seen.sum() ** 0.5, f"{name}: {error:.1e} beside {size:.1e}"


@pytest.mark.e2e
def test_local_negatives_communicate_no_embeddings(trained):
    for (case, negatives), count in trained[2]["counts"].items():
        if negatives == "local":
            assert count == 0, case
        else:
            assert count > 0, case
