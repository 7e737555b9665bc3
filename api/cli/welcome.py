"""What `abq up` says to the person who started it."""

from contextlib import AbstractContextManager

from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from api.cli.log_lines import LogLine
from api.cli.processes import Restart
from api.settings import Settings

__all__ = ["Voice"]


class Voice:
    """Speaks on standard output."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)

    def preparing(self) -> AbstractContextManager[Status]:
        """Say that the database is being prepared."""
        return self._console.status("Preparing the database")

    def starting(self) -> AbstractContextManager[Status]:
        """Say that the processes start."""
        return self._console.status("Starting API, worker and inference")

    def welcome(self, settings: Settings, url: str, key: str | None) -> None:
        """Say where the service is, how to get in and what to do next."""
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        facts.add_row("API", Text(url, style="bold cyan"))
        facts.add_row("Reference", f"{url}/docs")
        if key is None:
            facts.add_row("Key", "as before; abq keys lists and creates them")
        else:
            facts.add_row("Key", Text(key, style="bold green"))
            facts.add_row("", Text("shown only now; commands on this machine know it", style="dim"))
        facts.add_row("Data", str(settings.data_dir))
        facts.add_row("Logs", str(settings.data_dir / "logs"))
        facts.add_row("Try", Text("abq quantize <owner>/<model> w4a8 --watch", style="bold"))
        self._console.print(
            Panel(facts, title="ABQ is up", subtitle="Ctrl-C stops everything", expand=False)
        )

    def tell_restart(self, restart: Restart) -> None:
        """Say that a process ended and will be started again."""
        self._console.print(
            Text(
                f"{restart.program.name} ended with code {restart.exit_code};"
                f" it starts again in {restart.pause_s:.0f} s. The end of its log:",
                style="yellow",
            )
        )
        self._console.print(Text(restart.log_tail, style="dim"), soft_wrap=True)

    def tell_failure(self) -> None:
        """Say that the service gives up."""
        self._console.print(Text("A process does not stay up; giving up.", style="bold red"))

    def tell_stop(self) -> None:
        """Say that everything stops."""
        said = "Stopping; a running job keeps its finished layers. Ctrl-C again stops at once."
        self._console.print(Text(said, style="dim"))

    def tell_stopped(self) -> None:
        """Say that nothing runs any more."""
        self._console.print(Text("Stopped.", style="dim"))

    def show_line(self, line: LogLine) -> None:
        """Show one line of a log."""
        self._console.print(
            Text.assemble((f"{line.source:>9} ", "cyan"), line.text), soft_wrap=True
        )
