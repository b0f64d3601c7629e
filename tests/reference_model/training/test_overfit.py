"""The whole model can learn: it knows four pairs by heart."""

import pytest

from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.cli import parse
from reference_model.data.readers.refer import Refer
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.training.train import train
from tests.support.options import replace


@pytest.mark.slow
def test_metris_swin_b_memorises_four_pairs_from_random_weights(tmp_path, monkeypatch):
    scenes = GenerateConfig(root=tmp_path / "data", scenes="easy", size=160, train=4, val=1, test=0, seed=2)
    root = generate(scenes)
    records, chosen = Refer.records, {}

    def four(data, split):
        for record in records(data, "train"):
            chosen.setdefault(record.image_id, record)
        return list(chosen.values())[:4]

    # val is what it trained on: that it knows these pairs by heart is all that is asked.
    monkeypatch.setattr(Refer, "records", four)
    arguments = ["--preset", "metris_swin_b", "--data.root", str(root), "--out", str(tmp_path / "run")]
    config = parse("train", [*arguments, "--model.pretrained", "false"])
    options = {"drop_path_rate": 0.0, "window_size": 5}  # 160 px have 5 x 5 cells in the last stage
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = replace(config.model, image_size=160, image_encoder_options=options, text_encoder_options=text)
    run = train(
        replace(
            config,
            model=network,
            steps=28,
            batch_size=4,
            learning_rate=2e-4,
            warmup_steps=5,
            clip_norm=1.0,
            evaluate_every=0,
            save_every=0,
            cache=True,
        )
    )
    checkpoint = load_checkpoint(run)
    predictor = MetrisPredictor(checkpoint.model, checkpoint.tokenizer, image_size=160, max_tokens=20)
    scores = Evaluator().score(predictor, list(chosen.values())[:4])
    assert scores["count"] == 4 and scores["mIoU"] > 0.8, scores
