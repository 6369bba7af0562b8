"""Fills in what the reference renders: `expected`, or `error`, of every case in */cases.json beside this script.

A case is a folder with the files of a checkpoint that chat templates come from; its cases.json is a list of the arguments of
`apply_chat_template`. Run it with the versions below after adding cases, from anywhere:

    pip install transformers==5.23.0 jinja2==3.1.6 && python tests/templates/make.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import jinja2
import transformers
from transformers import AutoTokenizer

assert (transformers.__version__, jinja2.__version__) == ("5.23.0", "3.1.6")
HERE = Path(__file__).parent
VOCABULARY = HERE / "../../examples/models/storyteller/tokenizer.json"

for folder in sorted(path.parent for path in HERE.glob("*/cases.json")):
    with tempfile.TemporaryDirectory() as checkpoint:
        shutil.copytree(folder, checkpoint, dirs_exist_ok=True)
        shutil.copy(VOCABULARY, checkpoint)
        config = Path(checkpoint, "tokenizer_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    cases = json.loads((folder / "cases.json").read_text())
    for case in cases:
        case.pop("expected", None)
        case.pop("error", None)
        arguments = {key: value for key, value in case.items() if key not in ("messages", "template", "variables")}
        try:
            case["expected"] = tokenizer.apply_chat_template(
                case["messages"], chat_template=case.get("template"), tokenize=False, **arguments, **case.get("variables", {})
            )
        except jinja2.TemplateRuntimeError as error:
            case["error"] = ""
        except jinja2.TemplateError as error:
            # What the template itself raises is part of its interface; other wordings are not.
            case["error"] = "" if isinstance(error, jinja2.TemplateSyntaxError) else error.message
        except (ValueError, TypeError):
            case["error"] = ""
    (folder / "cases.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
