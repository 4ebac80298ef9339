//! The UAPI's text: `key=value` lines, each request and reply ended by an empty line.
//!
//! Every reader here is bounded (line length, number of lines) and copies no secret: a line is borrowed
//! from one buffer that is wiped when the reader goes.

pub mod get;
mod lines;
pub mod set;
pub mod stats;

use std::io::{self, Read};

pub use lines::Lines;

use crate::device::Op;

/// Longest line accepted, in bytes without its newline. The longest valid one is under 100.
pub const MAX_LINE: usize = 256;
/// Most lines in one request or reply: 5,000 peers with 200 prefixes each.
pub const MAX_LINES: usize = 1 << 20;

/// `errno` values of the replies (Linux `asm-generic/errno-base.h`), sent negated as wg(8) expects them.
pub mod errno {
    /// Input/output error.
    pub const EIO: i32 = 5;
    /// Malformed request.
    pub const EINVAL: i32 = 22;
    /// Unanswerable text.
    pub const EPROTO: i32 = 71;
}

/// Why a text was refused. Holds no value that could be a secret.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// A value does not fit its key, or the key is unknown or out of place.
    #[error("line {line}: {key}: {reason}")]
    Field {
        /// Counted from 1.
        line: usize,
        /// The key before `=`.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not `key=value`, or not UTF-8.
    #[error("line {0}: not key=value")]
    Syntax(usize),
    /// Longer than [`MAX_LINE`].
    #[error("line {0}: longer than {MAX_LINE} bytes")]
    LineTooLong(usize),
    /// More than [`MAX_LINES`].
    #[error("more than {MAX_LINES} lines")]
    TooManyLines,
    /// The stream ended before the empty line.
    #[error("line {0}: the text ends before its empty line")]
    Truncated(usize),
    /// The other side's `errno=`.
    #[error("refused with errno {0} ({err})", err = io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// The stream failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl CodecError {
    pub(crate) fn field(line: usize, key: &str, reason: impl ToString) -> Self {
        // Text in the place of a key may be a misplaced secret: only what looks like a key is repeated.
        let plain = key.len() <= 40 && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let key = if plain { key } else { "(not a key)" };
        Self::Field { line, key: key.to_owned(), reason: reason.to_string() }
    }

    /// The errno a server answers with, positive.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Errno(errno) => *errno,
            Self::Io(error) => error.raw_os_error().unwrap_or(errno::EIO),
            Self::Truncated(_) => errno::EPROTO,
            _ => errno::EINVAL,
        }
    }
}

/// One request to a UAPI server.
#[derive(Debug)]
pub enum Request {
    /// `get=1`: the device with its secrets.
    Get,
    /// `set=1`: changes, in order.
    Set(Vec<Op>),
    /// `get=stats`: mesh-datapath's counters. An extension of ours that stock tools never send.
    Stats,
}

/// Reads the next request; `None` at a clean end of the stream. After an error the rest of the request
/// has been skipped, so that a reply finds its reader.
pub fn read_request<R: Read>(lines: &mut Lines<R>) -> Result<Option<Request>, CodecError> {
    let result = parse_request(lines);
    match &result {
        Err(CodecError::Io(_) | CodecError::Truncated(_)) | Ok(_) => {}
        Err(_) => lines.skip_request()?,
    }
    result
}

fn parse_request<R: Read>(lines: &mut Lines<R>) -> Result<Option<Request>, CodecError> {
    loop {
        if let Some((line, key, value)) = lines.next_pair()? {
            let request = match (key, value) {
                ("set", "1") => return set::read_ops(lines).map(|ops| Some(Request::Set(ops))),
                ("get", "1") => Request::Get,
                ("get", "stats") => Request::Stats,
                ("get" | "set", _) => return Err(CodecError::field(line, key, "unknown operation")),
                _ => return Err(CodecError::field(line, key, "a request starts with get=1 or set=1")),
            };
            return match lines.next_pair()? {
                None => Ok(Some(request)),
                Some((line, key, _)) => Err(CodecError::field(line, key, "get takes no further lines")),
            };
        }
        // Empty lines between requests mean nothing.
        if lines.at_end() {
            return Ok(None);
        }
    }
}

/// `errno=` as a reply's last line, with the empty line; `errno` is positive or 0.
pub fn render_errno(errno: i32) -> String {
    format!("errno={}\n\n", -errno.abs())
}

/// Reads a reply to `set=1`.
pub fn read_set_reply<R: Read>(lines: &mut Lines<R>) -> Result<(), CodecError> {
    let mut status = None;
    while let Some((line, key, value)) = lines.next_pair()? {
        if key == "errno" {
            status = Some(parse_errno(line, value)?);
        }
    }
    finish(lines, status)
}

fn parse_errno(line: usize, value: &str) -> Result<i32, CodecError> {
    let errno = value.parse::<i32>().map_err(|e| CodecError::field(line, "errno", e))?;
    Ok(errno.saturating_abs())
}

fn finish<R>(lines: &Lines<R>, status: Option<i32>) -> Result<(), CodecError> {
    match status {
        Some(0) => Ok(()),
        Some(errno) => Err(CodecError::Errno(errno)),
        None => Err(CodecError::Truncated(lines.line())),
    }
}

fn parse_number<T>(line: usize, key: &str, value: &str) -> Result<T, CodecError>
where
    T: std::str::FromStr<Err = std::num::ParseIntError>,
{
    // `+1` is a number to Rust, but not to the UAPI.
    if value.starts_with('+') {
        return Err(CodecError::field(line, key, "not a decimal number"));
    }
    value.parse().map_err(|e| CodecError::field(line, key, e))
}
