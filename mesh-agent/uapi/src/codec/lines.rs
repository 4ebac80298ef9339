//! A bounded reader of `key=value` lines.

use std::io::Read;

use zeroize::Zeroizing;

use super::{CodecError, MAX_LINE, MAX_LINES};

const BUFFER: usize = 4096;

/// Lines of one stream, borrowed from a buffer that is wiped on drop.
pub struct Lines<R> {
    input: R,
    buffer: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
    line: usize,
    ended: bool,
    mid_line: bool,
}

impl<R: Read> Lines<R> {
    /// Reads from `input`, which needs no buffer of its own.
    pub fn new(input: R) -> Self {
        let buffer = Zeroizing::new(vec![0; BUFFER]);
        Self { input, buffer, start: 0, end: 0, line: 0, ended: false, mid_line: false }
    }

    /// The next pair, with its line's number; `None` at the empty line and at the end of the stream
    /// ([`Lines::at_end`] tells them apart).
    pub fn next_pair(&mut self) -> Result<Option<(usize, &str, &str)>, CodecError> {
        let Some(range) = self.next_line()? else {
            return Ok(None);
        };
        let line = self.line;
        let bytes = self.buffer.get(range).unwrap_or_default();
        if bytes.is_empty() {
            self.line = 0;
            return Ok(None);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| CodecError::Syntax(line))?;
        let (key, value) = text.split_once('=').ok_or(CodecError::Syntax(line))?;
        Ok(Some((line, key, value)))
    }

    fn next_line(&mut self) -> Result<Option<std::ops::Range<usize>>, CodecError> {
        let mut scanned = 0;
        loop {
            let pending = self.buffer.get(self.start + scanned..self.end).unwrap_or_default();
            if let Some(at) = pending.iter().position(|&b| b == b'\n') {
                let range = self.start..self.start + scanned + at;
                self.start = range.end + 1;
                self.line += 1;
                if range.len() > MAX_LINE {
                    return Err(CodecError::LineTooLong(self.line));
                }
                if self.line > MAX_LINES {
                    return Err(CodecError::TooManyLines);
                }
                return Ok(Some(range));
            }
            scanned = self.end - self.start;
            if scanned > MAX_LINE {
                self.start = self.end;
                self.mid_line = true;
                return Err(CodecError::LineTooLong(self.line + 1));
            }
            if !self.fill()? {
                self.ended = true;
                return if scanned == 0 && self.line == 0 {
                    Ok(None)
                } else {
                    Err(CodecError::Truncated(self.line + 1))
                };
            }
        }
    }

    /// Reads more; false at the end of the stream.
    fn fill(&mut self) -> Result<bool, CodecError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            match self.input.read(self.buffer.get_mut(self.end..).unwrap_or_default()) {
                Ok(n) => {
                    self.end += n;
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Passes over everything up to and with the next empty line, or the end of the stream.
    pub fn skip_request(&mut self) -> Result<(), CodecError> {
        let mut budget = MAX_LINES * 64;
        loop {
            while self.start < self.end {
                let newline = self.buffer.get(self.start) == Some(&b'\n');
                self.start += 1;
                if newline && !self.mid_line {
                    self.line = 0;
                    return Ok(());
                }
                self.mid_line = !newline;
                budget = budget.checked_sub(1).ok_or(CodecError::TooManyLines)?;
            }
            if !self.fill()? {
                self.ended = true;
                return Ok(());
            }
        }
    }
}

impl<R> Lines<R> {
    /// Whether the stream has ended.
    pub fn at_end(&self) -> bool {
        self.ended
    }

    /// The number of the line read last, from 1 in each request.
    pub fn line(&self) -> usize {
        self.line
    }
}
