"""Commands of lensbench as a user gives them, and what they answer."""

from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.results import schema as results


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result, *expected):
    """Exit code 2, one line, no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("lensbench: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for part in expected:
        assert part in lines[0]


def csv_bytes(folder):
    return {name: (folder / name).read_bytes() for name in results.WRITTEN}
