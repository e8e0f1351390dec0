"""The classifiers: pooling, losses, exact accumulation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from modeling_lnfree import (
    LNFreeForSequenceClassification,
    LNFreeForTokenClassification,
)

from ..conftest import every_backbone, every_variant, random_ids, tiny_config


@every_variant
@every_backbone
def test_classifies_by_the_last_token_that_is_not_padding(variant, backbone):
    model = LNFreeForSequenceClassification(tiny_config(variant, backbone, num_labels=3, pad_token_id=0)).eval()
    short, long = random_ids(1, 5), random_ids(1, 9)
    expected = torch.cat([model(short).logits, model(long).logits])
    pads = torch.zeros(1, 4, dtype=torch.long)
    for side in ("left", "right"):
        padded = torch.cat([torch.cat([pads, short] if side == "left" else [short, pads], dim=1), long])
        mask = (padded != 0).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=position_ids).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        if side == "right":
            torch.testing.assert_close(model(padded).logits, expected, atol=1e-5, rtol=1e-5)


def test_classification_losses_match_torch():
    input_ids = random_ids(4, 6)
    mask = torch.ones_like(input_ids)
    classes, values = torch.tensor([0, 1, 2, 1]), torch.randn(4, 1)
    model = LNFreeForSequenceClassification(tiny_config(num_labels=3)).eval()
    output = model(input_ids, attention_mask=mask, labels=classes)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, classes))
    model = LNFreeForSequenceClassification(tiny_config(num_labels=1, problem_type="regression")).eval()
    output = model(input_ids, attention_mask=mask, labels=values)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits.squeeze(), values.squeeze()))
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    config = tiny_config(num_labels=3, problem_type="multi_label_classification")
    output = LNFreeForSequenceClassification(config).eval()(input_ids, attention_mask=mask, labels=several)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, several))


def test_batch_without_any_sign_of_padding_is_refused():
    model = LNFreeForSequenceClassification(tiny_config(num_labels=3))
    with pytest.raises(
        ValueError, match="2 sequences need an attention_mask.*got neither .input_ids given, pad_token_id=None"
    ):
        model(random_ids(2, 6))


@every_variant
@every_backbone
def test_token_classes_are_a_linear_map_of_the_final_states(variant, backbone):
    model = LNFreeForTokenClassification(tiny_config(variant, backbone, num_labels=5)).eval()
    model.score.bias.data.normal_()
    input_ids, labels = random_ids(2, 9), torch.randint(5, (2, 9))
    labels[0, 4:] = -100
    states = model.model(input_ids).last_hidden_state
    output = model(input_ids, labels=labels)
    torch.testing.assert_close(output.logits, states @ model.score.weight.T + model.score.bias)
    # the class of each token itself, not of the next
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    pads = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([input_ids, pads], 1), torch.cat([torch.ones_like(input_ids), pads], 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :9], output.logits, atol=1e-5, rtol=1e-5)


def _train_head(head, num_labels, folder, batch_size, accumulation):
    torch.manual_seed(0)
    model = head(tiny_config(num_labels=num_labels, embedding_dropout=0.0, pad_token_id=0))
    rows = []
    for length in (9, 3, 7, 2, 8, 4, 6, 5):  # micro-batches with different token counts
        ids = random_ids(length).tolist() + [0] * (9 - length)
        labels = [i % num_labels if i else -100 for i in ids] if head is LNFreeForTokenClassification else length % 3
        rows.append({"input_ids": ids, "attention_mask": [int(i > 0) for i in ids], "labels": labels})
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        learning_rate=0.1,
        max_grad_norm=0,
        optim="sgd",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"], dict(model.named_parameters())


@pytest.mark.parametrize("head", [LNFreeForSequenceClassification, LNFreeForTokenClassification])
def test_trainer_accumulates_a_heads_gradients_exactly(head, tmp_path):
    whole_loss, whole = _train_head(head, 3, tmp_path, batch_size=8, accumulation=1)
    loss, parameters = _train_head(head, 3, tmp_path, batch_size=2, accumulation=4)
    assert loss == pytest.approx(whole_loss, abs=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, whole[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("head", [LNFreeForSequenceClassification, LNFreeForTokenClassification])
def test_classifier_dropout_acts_in_training_alone(head):
    model = head(tiny_config(num_labels=3, embedding_dropout=0.0, classifier_dropout=0.5)).train()
    input_ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    assert not torch.equal(*(model(input_ids, attention_mask=mask).logits for _ in range(2)))
    model.eval()
    assert torch.equal(*(model(input_ids, attention_mask=mask).logits for _ in range(2)))
