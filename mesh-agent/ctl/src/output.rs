//! Printing an answer in the format asked for.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Context as _;
use serde::Serialize;

use crate::args::Format;

/// Lets a write to a closed pipe end the process, as it does other filters.
pub(crate) fn quiet_broken_pipe() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    #[expect(unsafe_code, reason = "restoring a default disposition has no safe wrapper")]
    // SAFETY: SIG_DFL installs no handler, and no other thread exists yet.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}

/// Prints `value`, as `table` says for people.
pub(crate) fn print<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(value),
        Format::Json => serde_json::to_string_pretty(value).context("as JSON")?,
        Format::Yaml => serde_saphyr::to_string(value).context("as YAML")?,
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()).context("standard output")
}

/// Clears the terminal between two rounds of `--watch`; a file or pipe keeps all rounds.
pub(crate) fn next_round() {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        let _ = write!(out, "\x1b[H\x1b[2J");
    }
}
