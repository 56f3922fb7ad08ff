# SPDX-License-Identifier: Apache-2.0
"""The command line: what it answers without torch, options by the names they had, and wrong usage."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing

import pytest
from support import ENVIRONMENT
from test_config import CHANGED, FORMER_DEFAULTS, LATER

from berdiff_fast import cli
from berdiff_fast.training.config import FLAT, TrainConfig, read_yaml
from berdiff_fast.training.fields import is_section
from berdiff_fast.training.sections import Settings

#: Prints what the words print, then the processor time that took, and what of the heavy packages was imported.
QUICK = """
import sys, time
try:
    from berdiff_fast import cli
    cli.main(sys.argv[1:])
except SystemExit:
    pass
print("\\n", time.process_time(), *({"torch", "numpy", "triton", "h5py"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "words, says",
    [
        (["--version"], "berdiff-fast "),
        (["--help"], "Draw masks of a scan or a picture"),
        ([], "exit status: 0 done"),
        (["sample", "--help"], "--center ROW COLUMN"),
        (["train", "--help"], "--optimiser.batch-size INT"),
        (["evaluate", "--help"], "--slice-count INT"),
        (["bench", "--help"], "--from JSON"),
        (["import", "--help"], "PATIENT/NODULE"),
        (["completion", "bash"], "complete"),
        (["completion", "zsh"], "#compdef"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_answers_come_without_torch_and_at_once(words, says):
    """In half a second, the processor's: other work on the machine does not count."""
    done = [
        subprocess.run([sys.executable, "-c", QUICK, *words], env=ENVIRONMENT, capture_output=True, text=True)
        for _ in range(2)
    ]
    for run in done:
        assert run.returncode == 0 and says in run.stdout, run.stderr
    seconds, *imported = zip(*(run.stdout.splitlines()[-1].split() for run in done), strict=True)
    assert imported == [] and min(map(float, seconds)) < 0.5


def test_a_completion_is_a_script_that_knows_the_options():
    done = subprocess.run(
        [sys.executable, "-m", "berdiff_fast.cli", "completion", "bash"], env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0 and b"--slice-count" in done.stdout and b"--optimiser.batch-size" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout).returncode == 0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_tells_what_its_options_are(name, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert status.value.code == 0 and text.startswith(f"usage: berdiff-fast {name} ")
    owner = cli.command(name)
    for field in dataclasses.fields(owner):
        documented = any(f"{field.name}: " in (base.__doc__ or "") for base in owner.__mro__)
        assert documented, f"{field.name} of {name} is not in the docstring"


def test_no_option_means_two_things():
    """Options that commands share take the same; those of train that others might have are in sections."""
    options: dict[str, dict[str, object]] = {}
    for name in cli.COMMANDS:
        owner = cli.command(name)
        kinds = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if "Positional" not in str(field.type) and not is_section(kinds[field.name]):
                taken = [kind for kind in typing.get_args(kinds[field.name]) if kind is not type(None)]
                options.setdefault(field.name, {})[name] = taken[0] if len(taken) == 1 else kinds[field.name]
    assert set(options["slices"]) == {"sample"} and set(options["slice_count"]) == {"demo", "evaluate"}
    assert set(options["raters"]) == {"sample", "report"} and set(options["rater_count"]) == {"import"}
    different = {name for name, kinds in options.items() if len({str(kind) for kind in kinds.values()}) > 1}
    assert different <= {"device"}, {n: options[n] for n in different}  # whose choices differ


# ---------------------------------------------------------------------- names that options had


def parsed(name: str, *words: str):
    return cli.command(name).parse(f"berdiff-fast {name}", list(words))


def test_former_names_are_taken_with_a_note(capsys):
    required = ["--model", "m", "--data", "d", "--output", "o"]
    assert parsed("evaluate", *required, "--slices", "4").slice_count == 4
    assert capsys.readouterr().err == "berdiff-fast evaluate: --slices is called --slice-count now\n"
    assert parsed("demo", "--slices=2").slice_count == 2
    assert "--slice-count now" in capsys.readouterr().err
    assert parsed("import", "tree", "out", "--raters", "3").rater_count == 3
    assert "--rater-count now" in capsys.readouterr().err
    assert parsed("sample", "ct.nii", "--output", "o", "--slices", "3", "9", "--raters", "a", "b").slices == (3, 9)
    assert capsys.readouterr().err == ""


def test_options_of_several_commands_as_they_were():
    sample = parsed("sample", "in.nii", "-n", "3", "--output=o", "--center", "-5", "3.5", "--modes", "1", "3")
    assert (sample.n, sample.output, sample.center, sample.modes) == (3, "o", (-5.0, 3.5), ("1", "3"))
    assert parsed("sample", "--output", "o", "--roi", "1", "2", "3", "4", "in.nii").input == "in.nii"
    required = ["--model", "m", "--data", "d", "--output", "o"]
    for option in ("-n", "--n", "--samples"):
        assert parsed("evaluate", *required, option, "5").n == 5
    made = parsed("import", "t", "o", "--window", "-1000", "400", "--crop", "--size", "6", "8", "--no-preview")
    assert (made.window, made.crop, made.resize, made.preview) == ((-1000.0, 400.0), True, False, False)
    bench = parsed("bench", "--from", "b.json", "--update", "a.md", "b.md", "--no-compile")
    assert (bench.source, bench.update, bench.compile) == ("b.json", ("a.md", "b.md"), False)


def flat_words(values: dict) -> list[str]:
    """The options that every setting had."""
    words = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words


def config_of(*words: str) -> TrainConfig:
    train = parsed("train", *words)
    return TrainConfig(**{f.name: getattr(train, f.name) for f in dataclasses.fields(Settings)})


@pytest.mark.parametrize("values", [CHANGED, FORMER_DEFAULTS], ids=["changed", "defaults"])
def test_every_option_of_train_by_its_former_name(values, capsys):
    assert config_of(*flat_words(values)).to_dict() == {**values, **LATER}
    assert capsys.readouterr() == ("", "")


def test_every_option_of_train_in_its_section():
    words = []
    for name, value in CHANGED.items():
        section, _, setting = FLAT.get(name, name).rpartition(".")
        setting = ("no-" if value is False else "") + setting.replace("_", "-")
        words.append(f"--{section}.{setting}" if section else f"--{setting}")
        words += map(str, value) if isinstance(value, list) else [] if isinstance(value, bool) else [str(value)]
    assert config_of(*words).to_dict() == {**CHANGED, **LATER}


def test_command_line_over_yaml_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-4\nsteps: 7\nchannel_mult: [1, 2]\nflip: false\n")
    for options in (["--config", str(file)], [f"--config={file}"]):
        made = config_of(*options, "--steps", "9", "--network.attention-resolutions", "2")
        assert (made.optimiser.learning_rate, made.optimiser.steps) == (1e-4, 9)
        assert made.network.channel_mult == (1, 2) and made.network.attention_resolutions == (2,)
        assert made.augmentation.flip is False and made.optimiser.batch_size == TrainConfig().optimiser.batch_size
    file.write_text(made.to_yaml())
    assert TrainConfig.from_dict(read_yaml(file)) == made == config_of("--config", str(file))


def test_a_file_need_not_make_sense_without_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("crop_steps: 100\n")
    assert config_of("--config", str(tmp_path / "c.yaml"), "--crop", "64").augmentation.crop == 64


def test_help_shows_what_a_file_says(capsys):
    with pytest.raises(SystemExit):
        parsed("train", "--config", "lidc", "--help")
    assert "(default: 9600)" in capsys.readouterr().out


# ---------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    "words, says",
    [
        (["tran"], "Available subcommands: demo, info"),
        (["train", "--learning-rte", "3"], "there is no option --learning-rte; did you mean --learning-rate?"),
        (["train", "--no-flipp"], "did you mean --flip?"),
        (["train", "--zzz"], "there is no option --zzz; berdiff-fast train --help lists them all"),
        (["train", "--optimiser.learning-rte", "3"], "--optimiser.learning-rate"),
        (["train", "--steps", "many"], "--optimiser.steps"),
        (["train", "--validation-method", "euler"], "'ddim', 'ddpm', 'd3pm'"),
        (["sample", "in.nii"], "--output"),
        (["sample", "in.nii", "--output", "o", "--slices", "3"], "--slices"),
        (
            ["sample", "in.nii", "--output", "o", "--center", "1", "2", "--roi", "1", "2", "3", "4"],
            "not allowed together",
        ),
        (["import", "a", "b", "--crop", "--resize"], "not allowed together"),
        (["evaluate", "--model", "m", "--data", "d", "--output", "o", "--slices", "3", "9"], "Unrecognized options: 9"),
        (["completion", "powershell"], "bash"),
    ],
)
def test_wrong_usage(words, says, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(words)
    out, errors = capsys.readouterr()
    assert status.value.code == 2 and out == ""
    assert says in " ".join(errors.replace("│", " ").split())


def test_errors_of_a_config_are_one_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("optimiser: {learning_rte: 3}\n")
    assert cli.main(["train", "--config", str(file)]) == 1
    assert capsys.readouterr().err == (
        f"berdiff-fast train: {file}: unknown key 'optimiser.learning_rte' in the training config; did you mean "
        "'optimiser.learning_rate'?\n"
    )


def test_debug_shows_where(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["--debug", "train", "--config", str(tmp_path / "no.yaml")])
