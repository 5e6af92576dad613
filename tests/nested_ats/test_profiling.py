from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from nested_ats import CNN, CNNConfig, Cost, step_cost
from nested_ats.profiling import peak_bytes, training_step

CPU = torch.device("cpu")
MIB = 2**20


def block(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MIB, dtype=torch.uint8)


def test_the_peak_is_of_what_is_held_at_once():
    def run():
        first = block(1)
        second = block(5)  # held: 6
        del second
        third = block(3)  # held: 4
        fourth = block(4)  # held: 8, the peak
        del first, third
        return fourth, block(2)  # held: 6

    assert peak_bytes(run, CPU) == 8 * MIB


def test_what_was_held_before_does_not_count():
    held = [block(7)]
    for _ in range(3):
        assert peak_bytes(lambda: held.append(block(2)), CPU) == 2 * MIB
    assert peak_bytes(lambda: (held.clear(), block(2)), CPU) < 2 * MIB  # less is held than before


def test_activations_that_the_backward_pass_needs_are_held():
    x = torch.zeros(MIB, requires_grad=True)  # 4 MiB

    def run():
        y = x.exp().exp().exp()  # each keeps its result for the backward pass
        torch.autograd.backward(y, torch.ones_like(y))

    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 2 * 4 * MIB
    # Three results and the gradient of the last; then each gradient needs one more while its result is still there.
    assert 4 * 4 * MIB <= peak_bytes(run, CPU) <= 6 * 4 * MIB


class Sighted:
    """An image that notes each read, by level and boxes."""

    def __init__(self, image):
        self._image, self.asked = image, []
        self.shapes, self.downsamples = image.shapes, image.downsamples

    def read(self, level, boxes):
        self.asked.append((level, boxes.tolist()))
        return self._image.read(level, boxes)


def test_a_step_reads_views_and_patches_and_leaves_gradients(tiny_model, tiny_image):
    model, image = tiny_model(2).eval(), Sighted(tiny_image(2))
    training_step(model, [image], 0)
    assert [level for level, _ in image.asked] == [2, 1, 0]  # the whole image, the regions, the patches
    assert model.training
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_step_draws_anew_and_each_image_by_its_own_key(tiny_model, tiny_image):
    model, keys = tiny_model(1), []
    model.register_forward_pre_hook(lambda _, arguments: keys.extend(arguments[1].tolist()))
    for number in range(5):
        training_step(model, [tiny_image(1)] * 3, number)
    assert len(keys) == len(set(keys)) == 15


def test_the_cost_of_a_step(tiny_model, tiny_image):
    model, image = tiny_model(2), Sighted(tiny_image(2))
    cost = step_cost(model, [image, image], repeats=3)
    assert isinstance(cost, Cost)
    assert cost.seconds > 0
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    assert cost.peak_bytes > gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(image.asked) == 2 * 3 * (1 + 3 + 1)  # two images, three reads, of a warm-up, the repeats and the peak
    drawn = {str(boxes) for level, boxes in image.asked if level == 0}
    assert len(drawn) > 1


def test_memory_grows_with_what_a_cnn_sees(tiny_image):
    torch.manual_seed(0)
    model = CNN(CNNConfig(encoder="resnet8"), in_channels=1, classes=2).double()
    small, large = (step_cost(model, [tiny_image(depth)], repeats=1).peak_bytes for depth in (4, 6))
    assert large > 8 * small  # sixteen times the pixels; parameters and their gradients stay


def test_reads_run_on_the_threads_given(tiny_model, tiny_image):
    calls = []

    class Readers(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            calls.append(fn)
            return super().submit(fn, *args, **kwargs)

    with Readers(1) as readers:
        step_cost(tiny_model(1), [tiny_image(1)], repeats=2, readers=readers)
    assert len(calls) == 2 * 3  # the coarse view and the patches; not in the pass that measures memory
