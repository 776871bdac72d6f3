"""`taurl llm ppo`: from the command line to the report."""

from taurl.cli import main


def ppo(words, **changes):
    return ["llm", "ppo", *words(**({"truncated": "penalty"} | changes))[2:]]


def test_a_run_its_report_and_more_steps(here, words):
    changes = {"epochs": 2, "kl_target": 1.0, "value_clip": "None", "critic": "head"}
    assert main(ppo(words, **changes)) == 0
    page = (here / "run/report.html").read_text()
    for text in ("Explained variance", "Value loss", "Price of the KL", "KL of a completion", "Clip fraction"):
        assert text in page
    assert page.count('<figure><img src="data:image/svg+xml') == 2
    assert "completion by token" in page
    assert "importance ratios" in page
    assert (here / "run/final/model.safetensors").is_file()
    assert main(["llm", "ppo", "--resume", "run", "--steps", "5"]) == 0
    assert main(ppo(words, **changes, steps=5, out="whole")) == 0
    for name in ("optimizer", "critic", "controls"):
        file = f"checkpoints/step-000005/{name}.safetensors"
        assert (here / "run" / file).read_bytes() == (here / "whole" / file).read_bytes()


def test_what_is_wrong_is_said_in_one_line(here, words, failing):
    assert "without a critic there is no value" in failing(ppo(words, critic="none", truncated="bootstrap"), 2)
    assert "no such model folder: './nowhere'" in failing(ppo(words, critic="./nowhere"), 2)
    (here / "game.py").write_text("class Game:\n    pass\n")
    message = failing(ppo(words, dataset=None, rewards=None, environment="game.py:Game"), 2)
    assert "environment with seed" in message
    assert not (here / "run/final").exists()
