"""Print which scenarios of a run of the conformance suite failed: those with a check that did, each name once."""

import json
import re
import sys
from pathlib import Path

UNSCORED = {  # extensions that the SDK does not have
    "auth/dpop", "auth/dpop-nonce", "auth/wif-jwt-bearer", "auth/client-credentials-jwt",
    "auth/client-credentials-basic", "auth/enterprise-managed-authorization", "json-schema-2020-12-preservation",
}  # fmt: skip
found = set()
for path in Path(sys.argv[1]).rglob("checks.json"):
    name = re.sub(r"-\d{4}-\d\d-\d\dT.*$", "", str(path.parent.relative_to(sys.argv[1])))
    checks = json.loads(path.read_text())
    if any(check.get("status") == "FAILURE" for check in checks):
        found.add(name)
print(*sorted(found - UNSCORED))
