//! Words for people and programs on standard output.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

/// Like `println!`, for an output whose reader may leave (`mesh-lab status | head`).
///
/// The process ends quietly then, with the status of one that SIGPIPE ended; hosts end with it, as after any other
/// death. The signal itself stays off: with it, a child that does not read its input would end the lab.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => { $crate::out::line(format_args!($($words)*)) };
}

/// What [`say!`] does.
pub fn line(words: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{words}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(128 + libc::SIGPIPE),
        Err(error) => eprintln!("mesh-lab: standard output: {error}"),
        Ok(()) => {}
    }
}
