"""transformers' Trainer with a CLIPModel whose loss makes no logits: import the class from here, the rest is as ever.

    pip install 'smartclip-kernels[transformers]'
    python examples/train_transformers.py

The model is small and the pairs are made, so that it runs anywhere in seconds. A model of the hub is
``CLIPModel.from_pretrained(name)``; one that somebody else loads is converted by `patch(model)`.
"""

import tempfile
from typing import Any

import torch
from transformers import CLIPConfig, Trainer, TrainingArguments

from smartclip_kernels.integrations.transformers import CLIPModel

KINDS, BATCH = 64, 32


class MadePairs(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Noisy pictures of KINDS patterns, and captions that name them."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(KINDS, 3, 32, 32, generator=generator)
        self.kinds = torch.arange(count) % KINDS
        self.images = patterns[self.kinds] + 0.5 * torch.randn(count, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.tensor([KINDS, int(self.kinds[i]), KINDS + 1])
        return {"pixel_values": self.images[i], "input_ids": tokens, "attention_mask": torch.ones(3, dtype=torch.long)}


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return {**batch, "return_loss": True}  # which is all that a CLIPModel needs to be trained


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokens = {"vocab_size": KINDS + 2, "bos_token_id": KINDS, "eos_token_id": KINDS + 1, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**layers, **tokens, "max_position_embeddings": 8},
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=64,
    )
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(CLIPModel(config), arguments, data_collator=collate, train_dataset=MadePairs(512))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.5f} -> {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    main()
