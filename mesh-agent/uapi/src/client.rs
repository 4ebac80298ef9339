//! A blocking client of a UAPI socket.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::codec::{self, CodecError, Lines};
use crate::device::{Device, Op};
use crate::stats::Stats;

/// Where the sockets are, for every implementation and every tool (wg(8)).
pub const SOCKET_DIR: &str = "/var/run/wireguard";

/// The socket of the interface `name`.
pub fn socket_path(name: &str) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{name}.sock"))
}

/// A request that failed, with the socket it went to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: no such file, or a dead server's socket.
    #[error("{path}: cannot connect: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// With its errno.
        source: io::Error,
    },
    /// The request could not be written.
    #[error("{path}: cannot write the request: {source}")]
    Write {
        /// The socket.
        path: PathBuf,
        /// With its errno.
        source: io::Error,
    },
    /// The server refused, or its reply makes no sense.
    #[error("{path}: {operation}: {source}")]
    Reply {
        /// The socket.
        path: PathBuf,
        /// `get`, `set` or `get=stats`.
        operation: &'static str,
        /// What it said.
        source: CodecError,
    },
}

impl ClientError {
    /// Whether no server is there, as opposed to one that refused.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }

    /// The errno behind it, if there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Connect { source, .. } | Self::Write { source, .. } => source.raw_os_error(),
            Self::Reply { source, .. } => Some(source.errno()),
        }
    }
}

/// Talks to one socket, one connection a request: a server may restart between two of them.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
}

impl Client {
    /// For the socket at `path`, with a limit of 5 seconds on each read and write.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), timeout: Duration::from_secs(5) }
    }

    /// The same with another limit, which must not be zero.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The device as it is, without its secrets.
    pub fn get(&self) -> Result<Device, ClientError> {
        let stream = self.request("get=1\n\n")?;
        self.reply("get", codec::get::read(&mut Lines::new(stream)))
    }

    /// Applies the operations in order. A refused request changes nothing; a device operation after a
    /// peer's makes a second request, which is then not sent.
    pub fn apply(&self, ops: &[Op]) -> Result<(), ClientError> {
        for request in codec::set::render_requests(ops) {
            let stream = self.request(&request)?;
            self.reply("set", codec::read_set_reply(&mut Lines::new(stream)))?;
        }
        Ok(())
    }

    /// mesh-datapath's counters. Other implementations refuse.
    pub fn stats(&self) -> Result<Stats, ClientError> {
        let stream = self.request("get=stats\n\n")?;
        self.reply("get=stats", codec::stats::read(&mut Lines::new(stream)))
    }

    fn request(&self, text: &str) -> Result<UnixStream, ClientError> {
        let path = || self.path.clone();
        let connect = || {
            let stream = UnixStream::connect(&self.path)?;
            stream.set_read_timeout(Some(self.timeout))?;
            stream.set_write_timeout(Some(self.timeout))?;
            Ok(stream)
        };
        let mut stream = connect().map_err(|source| ClientError::Connect { path: path(), source })?;
        stream.write_all(text.as_bytes()).map_err(|source| ClientError::Write { path: path(), source })?;
        Ok(stream)
    }

    fn reply<T>(&self, operation: &'static str, result: Result<T, CodecError>) -> Result<T, ClientError> {
        result.map_err(|source| ClientError::Reply { path: self.path.clone(), operation, source })
    }
}
