"""Float32 matrix products at full precision."""
import pytest
import torch

from common.data.memory import resize_boxes
from common.precision import full_precision


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_full_precision(setting, device):
    """No TF32 and no autocast inside; both are back afterwards, after an error too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        x = torch.rand(4, 4, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            with full_precision(device.type):
                assert not torch.backends.cuda.matmul.allow_tf32
                assert (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(ValueError), full_precision(device.type):
            raise ValueError
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend, precision", [
    (torch.backends.cuda.matmul, "tf32"), (torch.backends.mkldnn.matmul, "bf16")])
def test_full_precision_where_the_newer_setting_was_used(backend, precision, device):
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [one.fp32_precision for one in backends]
    try:
        backend.fp32_precision = precision
        inside = [one.fp32_precision for one in backends]
        with full_precision(device.type):
            assert [one.fp32_precision for one in backends] == ["ieee", "ieee"]
        assert [one.fp32_precision for one in backends] == inside
    finally:
        for one, value in zip(backends, before, strict=True):
            one.fp32_precision = value


def test_full_precision_in_a_graph(device):
    """Dynamo takes it whole; the switch is in the graph, in both directions."""
    code = []

    def backend(graph, inputs):
        code.append(graph.code)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def product(x):
        with full_precision(x.device.type):
            return x @ x

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        product(torch.rand(4, 4, device=device))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    off, on = (code[0].index(f"set_float32_matmul_precision('{word}')")
               for word in ("highest", "high"))
    assert off < code[0].index(" @ ") < on


def test_resized_crops_are_guarded(monkeypatch, device):
    """resize_boxes multiplies at full precision where a program allows TF32."""
    seen, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (
        seen.append(torch.get_float32_matmul_precision()), product(a, b))[1])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=device)
        boxes = torch.tensor([[0, 0, 5, 6]] * 2, device=device).T
        resize_boxes(images, boxes, (4, 4), "bilinear")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 2
