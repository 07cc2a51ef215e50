"""SAMix in a plain loop, of any network that returns a middle feature map and pooled features."""
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

ROOT = __file__.rsplit("examples", 1)[0]        # or "owner/mixup-zoo", source="github"
STEPS = 100


class Backbone(nn.Module):
    """torchvision's ResNet-18: features after its third stage, and those its classifier sees."""

    def __init__(self):
        super().__init__()
        self.net = create_feature_extractor(resnet18(), ["layer3", "flatten"])

    def forward(self, images):
        return tuple(self.net(images).values())


device = "cuda" if torch.cuda.is_available() else "cpu"
net = torch.hub.load(ROOT, "samix", source="local", backbone=Backbone().to(device),
                     num_classes=10, image_size=64, total_steps=STEPS)
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
for _ in range(STEPS):
    images = torch.randn(16, 3, 64, 64, device=device)                          # your loader
    labels = torch.randint(10, (16,), device=device)
    loss, _ = net(images, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    net.update()                                # the moving average follows
print(f"loss {loss.item():.4f}")
