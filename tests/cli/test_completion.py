"""The completion script completes in a real bash."""

import shutil
import subprocess

import pytest

from maskalign.cli import main

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    import shtab

    from maskalign.cli.completion import command_tree

    path = tmp_path_factory.mktemp("completion") / "maskalign.bash"
    path.write_text(shtab.complete(command_tree(), "bash"))
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "line, found",
    [
        (["maskalign", "tra"], ["train"]),
        (["maskalign", "data", "en"], ["encode"]),
        (["maskalign", "sample", "--sampl"], ["--sampler"]),
        (["maskalign", "sample", "--sampler", "h"], ["heun"]),
        (["maskalign", "train", "--model.mixer", "d"], ["depthwise_conv"]),
        (["maskalign", "train", "--training.max_st"], ["--training.max_steps"]),
        (["maskalign", "train", "--config", "imagenet256/b2/re"], ["imagenet256/b2/reg", "imagenet256/b2/repa"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_bash(script, line, found):
    words = " ".join(f"'{word}'" for word in line)
    code = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _shtab_maskalign; "
    done = subprocess.run(["bash", "-c", code + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True)
    assert set(found) <= set(done.stdout.split()), (done.stdout, done.stderr)


def test_zsh_and_an_unknown_shell(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "zsh"])
    assert end.value.code == 0 and "#compdef maskalign" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["completion", "fish"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "fish is not one of bash, zsh" in err and err.count("\n") == 1
