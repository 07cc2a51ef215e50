"""SAGE in the training_step of a LightningModule; each rank draws for itself."""
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

ROOT = __file__.rsplit("examples", 1)[0]        # or "owner/mixup-zoo", source="github"
STEPS = 100


class Classifier(lightning.LightningModule):
    """A ResNet-18 that learns from SAGE's mixtures."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = resnet18(num_classes=num_classes)
        self.mixer = torch.hub.load(ROOT, "mixer", source="local", method="sage",
                                    num_classes=num_classes, rand_pos=0.1)

    def training_step(self, batch, batch_idx):
        mixed, targets = self.mixer(*batch, self.net)
        loss = torch.nn.functional.cross_entropy(self.net(mixed), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10              # your data set
trainer = lightning.Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False)
trainer.fit(Classifier(10), DataLoader(TensorDataset(images, labels), 16, shuffle=True))
print(f"loss {trainer.callback_metrics['loss'].item():.4f}")
