//! Enough of an HTTP/1.1 client: one request a connection, over whatever socket leads there.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail};

/// An answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body of an answer 2xx; any other is an error that says it.
    pub fn good(self) -> Result<Vec<u8>> {
        if !(200..300).contains(&self.status) {
            bail!("answer {}: {}", self.status, String::from_utf8_lossy(&self.body).trim());
        }
        Ok(self.body)
    }
}

/// Sends a request (with a body of that type, if there is one) and reads until the other end closes.
pub fn exchange(
    stream: &mut (impl Read + Write),
    method: &str,
    path: &str,
    body: Option<(&str, &[u8])>,
) -> Result<Answer> {
    let (kind, body) = body.unwrap_or_default();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    head += &format!("Accept: application/json\r\nContent-Length: {}\r\n", body.len());
    if !kind.is_empty() {
        head += &format!("Content-Type: {kind}\r\n");
    }
    head += "\r\n";
    stream.write_all(&[head.as_bytes(), body].concat()).context("send request")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("read answer")?;
    parse(&answer)
}

fn parse(answer: &[u8]) -> Result<Answer> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").context("answer has no header")?;
    let (head, rest) = answer.split_at(end);
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let body = rest.get(4..).unwrap_or_default();
    let body = if head.contains("transfer-encoding: chunked") { unchunk(body)? } else { body.to_vec() };
    let status = head.split(' ').nth(1).unwrap_or_default();
    let status = status.parse().with_context(|| format!("status {status:?}"))?;
    Ok(Answer { status, body })
}

fn unchunk(mut body: &[u8]) -> Result<Vec<u8>> {
    let mut whole = Vec::new();
    loop {
        let end = body.windows(2).position(|two| two == b"\r\n").context("chunk has no length")?;
        let (length, rest) = body.split_at(end);
        let length =
            usize::from_str_radix(String::from_utf8_lossy(length).trim(), 16).context("chunk length")?;
        if length == 0 {
            return Ok(whole);
        }
        let end = length.checked_add(2).context("chunk length")?;
        whole.extend(rest.get(2..end).context("truncated chunk")?);
        body = rest.get(end + 2..).context("truncated chunk")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_framings_are_read_and_errors_are_said() {
        let body = |answer: &[u8]| parse(answer).unwrap().good();
        assert_eq!(body(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap(), b"{}");
        let chunked = b"HTTP/1.1 201 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[1\r\n1\r\n]\r\n0\r\n\r\n";
        assert_eq!(body(chunked).unwrap(), b"[1]");
        let error = body(b"HTTP/1.1 503 no\r\n\r\n{\"error\":\"later\"}").unwrap_err().to_string();
        assert!(error.contains("503") && error.contains("later"), "{error}");
        assert!(parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n[").is_err());
        assert!(parse(b"HTTP/1.1\r\n\r\n").is_err());
    }
}
