"""The code that a card shows for OpenVINO GenAI (eval/engines/snippets.py has the others). It
converts both models first; why EAGLE-3 needs more than that stands in docs/engines.md."""

END = """
pipe = genai.LLMPipeline("target-ov", "CPU", draft_model=genai.draft_model("drafter-ov", "CPU"))
config = genai.GenerationConfig()
config.max_new_tokens, config.num_assistant_tokens = 64, {draft_length}
print(pipe.generate({question}, config))
"""


def code(family: str, draft_length: int, question: str) -> str:
    """Python that prints an answer to the question, for the target "TARGET" and the drafter
    "DRAFTER". Raises ValueError for a family that OpenVINO does not serve."""
    end = END.format(draft_length=draft_length, question=repr(question))
    if family == "lm":
        return f"""import openvino_genai as genai
from optimum.exporters.openvino import main_export

as_text = {{"task": "text-generation-with-past", "convert_tokenizer": True}}
main_export("TARGET", "target-ov", **as_text)
main_export("DRAFTER", "drafter-ov", **as_text)
{end}"""
    if family != "eagle3":
        raise ValueError(f"OpenVINO serves lm and eagle3, not {family}")
    return f"""from pathlib import Path

import openvino
import openvino_genai as genai
from optimum.exporters.openvino import main_export
from optimum.exporters.openvino.convert import export_from_model, export_tokenizer
from optimum.exporters.openvino.model_patcher import LlamaEagle3ForCausalLM
from transformers import AutoTokenizer, PreTrainedModel

task = "text-generation-with-past"
main_export("TARGET", "target-ov", task=task, convert_tokenizer=True)
drafter, report = LlamaEagle3ForCausalLM.from_pretrained("DRAFTER", output_loading_info=True)
if "model.d2t" in report["missing_keys"]:  # it drafts the whole vocabulary
    drafter.model.d2t.zero_()
LlamaEagle3ForCausalLM.__module__ = PreTrainedModel.__module__  # tells the exporter the library
export_from_model(drafter, "drafter-ov", task=task)
export_tokenizer(AutoTokenizer.from_pretrained("TARGET"), "drafter-ov")
model = openvino.Core().read_model("drafter-ov/openvino_model.xml")
taps = drafter.config.eagle_aux_hidden_state_layer_ids
model.set_rt_info([k - 1 for k in taps], "hidden_layers_list")  # OpenVINO counts outputs of layers
openvino.save_model(model, "drafter-ov/named.xml", compress_to_fp16=False)
del model
for kind in ("xml", "bin"):
    Path(f"drafter-ov/named.{{kind}}").replace(f"drafter-ov/openvino_model.{{kind}}")
{end}"""
