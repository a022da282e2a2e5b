"""OpenAI's fields that this version does not act on: refused, harmless, or unknown.

Refused are fields that would change the answer, unless their value asks for nothing (`tools: []`). Harmless
are fields that concern OpenAI's own platform, or hints that a server may disregard. Any other field is named
in the response header `x-ignored-fields`, so that nothing is ignored silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from worker_orcd.errors import InvalidParameter

HARMLESS = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

# Field → values that ask for nothing. Absent and null always do.
REFUSED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (0,),
    "regex": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_n_sigma": (-1,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
    "xtc_probability": (0,),
}

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_NAMED = 16


def ignored_fields(extra: Mapping[str, object]) -> dict[str, str]:
    """Response headers that name what was ignored, if anything. Raises InvalidParameter for a refused one."""
    for name, value in extra.items():
        if name in REFUSED and not any(_same(value, nothing) for nothing in REFUSED[name]):
            raise InvalidParameter(f"{name} is not supported in this version of the worker", param=name)
    unknown = sorted(name for name in extra if name not in REFUSED and name not in HARMLESS)
    named = [name if _NAME.fullmatch(name) else "(unprintable)" for name in unknown[:_MAX_NAMED]]
    return {"x-ignored-fields": ", ".join(named)} if named else {}


def _same(value: object, nothing: object) -> bool:
    return value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
