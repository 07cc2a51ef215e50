"""A mixer as timm's `mixup_fn`, which its train.py (--no-prefetcher) calls on the device."""
from functools import partial

import timm
import torch
from timm.loss import SoftTargetCrossEntropy

ROOT = __file__.rsplit("examples", 1)[0]        # or "owner/mixup-zoo", source="github"
STEPS = 100

device = "cuda" if torch.cuda.is_available() else "cpu"
net = timm.create_model("resnet10t", num_classes=10).to(device)
mixer = torch.hub.load(ROOT, "mixer", source="local", method="puzzle", num_classes=10, prob=0.5,
                       mean=net.default_cfg["mean"], std=net.default_cfg["std"])
mixup_fn, loss_fn = partial(mixer, model=net), SoftTargetCrossEntropy()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for _ in range(STEPS):
    images = torch.randn(16, 3, 64, 64, device=device)                          # timm's loader
    labels = torch.randint(10, (16,), device=device)
    images, targets = mixup_fn(images, labels)
    loss = loss_fn(net(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.4f}")
