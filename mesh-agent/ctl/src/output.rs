//! Printing an answer in the format asked for.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Context as _;
use serde::Serialize;

use crate::args::Format;

/// What a shell shows for a filter that SIGPIPE ended. The signal itself stays ignored: it would also end the program
/// when the agent breaks off.
const EXIT_PIPE_CLOSED: i32 = 141;

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
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        // A reader that went away (`meshctl peers | head`) is no error of ours.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(EXIT_PIPE_CLOSED),
        written => written.context("standard output"),
    }
}

/// Clears the terminal between two rounds of `--watch`; a file or pipe keeps all rounds.
pub(crate) fn next_round() {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        let _ = write!(out, "\x1b[H\x1b[2J");
    }
}
