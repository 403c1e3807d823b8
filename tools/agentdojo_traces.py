"""Print the ground-truth traces of AgentDojo's suites, a line of JSON a task; run by the Python that has agentdojo."""

import json
import sys

from agentdojo.task_suite.load_suites import get_suites

VERSION = "v1.2.2"
for suite_name, suite in get_suites(VERSION).items():
    for kind, tasks in (("user", suite.user_tasks), ("injection", suite.injection_tasks)):
        for name, task in tasks.items():
            environment = suite.load_and_inject_default_environment({})
            calls = [{"tool": call.function, "arguments": dict(call.args)} for call in task.ground_truth(environment)]
            line = {"suite": suite_name, "kind": kind, "task": name, "calls": calls}
            sys.stdout.write(json.dumps(line, default=str) + "\n")
