"""SentenceTransformerTrainer with a fused in-batch ranking loss: the import is what changes.

    pip install 'smartclip-kernels[sentence-transformers]'
    python examples/train_sentence_transformers.py

The model is a small BERT of random weights over made sentences, so that it runs anywhere in seconds; a model of the hub
is ``SentenceTransformer(name)``.
"""

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from smartclip_kernels.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

SUBJECTS, FILLERS = [f"subject{i}" for i in range(64)], [f"word{i}" for i in range(64)]


def made_pairs(count: int) -> Dataset:
    """Questions and documents that have a subject in common, and nothing else."""
    draw = random.Random(0)

    def sentence(subject: str) -> str:
        words = [subject, *draw.choices(FILLERS, k=4)]
        draw.shuffle(words)
        return " ".join(words)

    subjects = [SUBJECTS[i % len(SUBJECTS)] for i in range(count)]
    return Dataset.from_dict({name: [sentence(x) for x in subjects] for name in ("anchor", "positive")})


def small_model(directory: Path) -> SentenceTransformer:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *SUBJECTS, *FILLERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    layers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(vocabulary), **layers)).save_pretrained(directory)
    return SentenceTransformer(modules=[Transformer(str(directory)), Pooling(64)])


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        model = small_model(Path(directory))
        both = ("query_to_doc", "doc_to_query")  # CLIP's loss; the default is the first alone
        loss = CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=16, directions=both, partition_mode="per_direction"
        )
        arguments = SentenceTransformerTrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=made_pairs(1024), loss=loss)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.5f} -> {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    main()
