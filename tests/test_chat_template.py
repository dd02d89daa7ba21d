"""Chat templates: rendered as transformers renders them, kept from harm, and what they end a turn with."""

import datetime
import pathlib
import time

import pytest

from chat_models import chat_model, chat_tokenizer, template_of
from looplm import chat_template
from looplm.chat_template import ChatTemplate
from looplm.errors import CheckpointError, DataError, UsageError
from looplm.model_files import open_model

ASKED = [{"role": "user", "content": "Hi"}]
TALK = [*ASKED, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "So?"}]
HARMLESS = "{{ messages[0].content }}"


def opened(source: str, **texts: str) -> ChatTemplate:
    return ChatTemplate("a.json", source, texts, "enable_thinking" in source, "")


def of(folder: pathlib.Path) -> ChatTemplate:
    return ChatTemplate.of(folder, open_model(folder).special_tokens)


# ---- what is rendered


def test_the_published_format(tmp_path: pathlib.Path) -> None:
    template = of(chat_model(tmp_path))
    told = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.prompt(ASKED) == told + asked
    assert template.prompt(ASKED, think=True) == told + asked + "<think>\n"
    assert template.prompt(ASKED, think=False) == told + asked
    assert template.prompt([{"role": "system", "content": "Be brief."}, *TALK]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.turn_end(chat_tokenizer()) == 2


def test_thinking_is_refused_where_the_template_does_not_know_it(tmp_path: pathlib.Path) -> None:
    template = of(chat_model(tmp_path, template_of("ouro-1.4b")))
    assert not template.knows_thinking
    for think in (True, False):
        with pytest.raises(
            UsageError, match=r"tokenizer_config\.json: this chat template does not know enable_thinking"
        ):
            template.prompt(ASKED, think=think)


def test_white_space_around_blocks_goes_as_transformers_lets_it_go() -> None:
    inner = "    {% if m.role == 'user' %}\n{{ m['content'] }}\n    {% endif %}\n"
    source = f"{{% for m in messages %}}\n{inner}{{% endfor %}}\nend\n"
    assert opened(source).prompt(TALK) == "Hi\nSo?\nend"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi</s>"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% generation %}{{ messages[0].content }}!{% endgeneration %}", "Hi!"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ tools is defined and tools }}{{ messages | length }}{{ unknown }}", "False3"),
        ("{{ '<b>' }}{{ messages[1].content.strip().upper() }}", "<b>YO"),
        ("{{ add_generation_prompt }}", "True"),
    ],
)
def test_what_templates_use(source: str, text: str) -> None:
    assert opened(source, bos_token="<s>", eos_token="</s>").prompt(TALK) == text


def test_the_date_is_known() -> None:
    assert opened("{{ strftime_now('%Y') }}").prompt(ASKED) in {
        str(datetime.date.today().year + later) for later in (0, -1)
    }


def test_of_several_templates_the_default_one_is_used_and_a_file_goes_before_all(tmp_path: pathlib.Path) -> None:
    entries = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = chat_model(tmp_path, "gone", chat_template=entries)
    assert of(folder).prompt(ASKED) == "yes"
    (folder / "chat_template.jinja").write_text("file")
    assert of(folder).prompt(ASKED) == "file"
    assert of(folder).where == str(folder / "chat_template.jinja")


@pytest.mark.parametrize(
    ("after", "end"),
    [("<|im_end|>\n", 2), (" \n<|endoftext|>", 0), ("", None), ("\nUser:", None), ("</think><|im_end|>", 4)],
)
def test_what_ends_a_turn_is_the_first_thing_behind_an_answer(after: str, end: int | None) -> None:
    assert ChatTemplate("x", "", {}, False, after).turn_end(chat_tokenizer()) == end


# ---- what goes wrong


def test_a_folder_without_template_says_what_else_can_be_done(tmp_path: pathlib.Path) -> None:
    folder = chat_model(tmp_path, "gone")
    with pytest.raises(CheckpointError, match="has no chat template, neither in ") as caught:
        of(folder)
    assert "looplm generate" in caught.value.hint


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="jinja2, which is not installed") as caught:
        opened(HARMLESS).prompt(ASKED)
    assert "looplm-cpu[chat]" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m }", "TemplateSyntaxError: .*(line 2)"),
        ("{{ messages[7].content.strip() }}", "UndefinedError: "),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(999999999) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ cycler.__init__.__globals__.os.system('touch harmed') }}", "SecurityError|UndefinedError"),
        ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound|no loader"),
        ("{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "1024 MiB"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError|MemoryError"),
    ],
)
def test_a_template_that_fails_is_two_lines(
    source: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        opened(source).prompt(ASKED)
    assert str(caught.value).startswith("the chat template in a.json fails: ")
    assert "correct the template" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "PATIENCE", 1.0)
    began = time.monotonic()
    nested = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(DataError, match="it had not come to an end after 1 seconds"):
        opened(nested).prompt(ASKED)
    assert time.monotonic() - began < 10
