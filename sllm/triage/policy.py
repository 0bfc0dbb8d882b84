"""What the small model is asked about a request, in two languages, and the limits of the asking."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from typing import Any

from sllm.engine._ffi import checked_int

__all__ = ["FORM", "Policy", "Wording"]

FORM = "<text {nonce}>\n{text}\n</text {nonce}>\n{question}"
"""How the request is wrapped; another form gives a policy another id."""

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


