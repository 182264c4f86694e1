"""`flashformer doctor`: what this machine has, what is missing, and how to mend it.

-> one line a finding: ok, warn or fail
"""

import sys

from flashformer.serve import options
from flashformer.serve.failure import EXIT_OK, EXIT_RUNTIME
from flashformer.serve.findings import Finding, all_findings
from flashformer.serve.terminal import write_json


def doctor(
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Check Python, compiler, processor, memory, cache, GPU; exit code 0 if the CPU path runs."""
    findings = all_findings()
    ready = not any(finding.level == "fail" for finding in findings)
    if as_json:
        write_json({"ready": ready, "findings": [finding.to_json() for finding in findings]})
    else:
        for finding in findings:
            sys.stdout.write(_line(finding) + "\n")
    return EXIT_OK if ready else EXIT_RUNTIME


def _line(finding: Finding) -> str:
    cure = f"; {finding.cure}" if finding.cure else ""
    return f"{finding.level:<4}  {finding.subject:<10} {finding.detail}{cure}"
