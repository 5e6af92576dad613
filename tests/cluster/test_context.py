import logging

import torch

from cluster import Context, LocalContext


def test_the_sum_over_one_process_is_its_own():
    context: Context = LocalContext("cpu")
    tensor = torch.tensor([1.0, 2.0])
    context.all_reduce(tensor)
    assert tensor.tolist() == [1.0, 2.0]
    assert (context.rank, context.world_size, context.device) == (0, 1, "cpu")


def test_report_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="cluster"):
        LocalContext().report({"loss": 0.5})
    assert "{'loss': 0.5}" in caplog.text
