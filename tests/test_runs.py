import pytest

from dreamer4.runs import run_kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ('{"latent_action": {}}', "latent_action"),
        ('{"tokenizer": {}, "latent_actions": {}, "dynamics": {}}', "dynamics"),
        ('{"tokenizer": {}, "maskgit": {}}', "maskgit"),
        ('{"video_tokenizer": {}}', "video_tokenizer"),
        ('{"tokenizer": {}}', "tokenizer"),
        ("{}", None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_a_run_tells_by_its_configuration_of_what_kind_it_is(tmp_path, config, kind):
    if config:
        (tmp_path / "config.json").write_text(config)
    assert run_kind(tmp_path) == kind
