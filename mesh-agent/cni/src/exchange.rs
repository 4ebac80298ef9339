//! The question to mesh-agent: a JSON line each way on its socket, the namespace's descriptor beside the
//! request.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mesh_api::cni::{Reply, Request};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::error::{CniError, ENVIRONMENT, IO, TRY_AGAIN};

/// Longer than the agent takes to give up on its own, shorter than a runtime waits.
const PATIENCE: Duration = Duration::from_secs(90);
/// Bytes in a reply line.
const MAX_REPLY: u64 = 1 << 20;
/// `f_type` of a file below /proc/*/ns (NSFS_MAGIC in linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// The pod's network namespace: a namespace, and not the host's.
pub(crate) fn open_netns(path: &str) -> Result<File, CniError> {
    let bad =
        |problem: &dyn std::fmt::Display| CniError::new(ENVIRONMENT, format!("CNI_NETNS: {path}: {problem}"));
    if path.is_empty() {
        return Err(CniError::new(ENVIRONMENT, "CNI_NETNS: is not set"));
    }
    let file = File::open(path).map_err(|error| bad(&error))?;
    let kind = nix::sys::statfs::fstatfs(&file).map_err(|error| bad(&error))?.filesystem_type();
    if kind.0 as i64 != NSFS_MAGIC {
        return Err(bad(&"is not a network namespace"));
    }
    let same = |own: &std::fs::Metadata, other: &std::fs::Metadata| {
        (own.dev(), own.ino()) == (other.dev(), other.ino())
    };
    match (std::fs::metadata("/proc/self/ns/net"), file.metadata()) {
        (Ok(own), Ok(other)) if same(&own, &other) => Err(bad(&"is the host's own network namespace")),
        _ => Ok(file),
    }
}

/// Asks, and waits for the answer.
pub(crate) fn ask(socket: &Path, request: &Request, netns: Option<&File>) -> Result<Reply, CniError> {
    let name = socket.display();
    let mut stream = UnixStream::connect(socket)
        .map_err(|error| CniError::new(TRY_AGAIN, format!("mesh-agent is not there yet: {name}: {error}")))?;
    let failed = |error: &dyn std::fmt::Display| {
        CniError::new(TRY_AGAIN, format!("mesh-agent broke off: {name}: {error}"))
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| failed(&error))?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(|error| failed(&error))?;

    let mut line = serde_json::to_vec(request).map_err(|error| CniError::new(IO, error.to_string()))?;
    line.push(b'\n');
    // The descriptor rides on the first byte that arrives with it.
    let descriptors: Vec<RawFd> = netns.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
    let sent =
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&line)], control, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|error| failed(&error))?;
    stream.write_all(&line[sent..]).map_err(|error| failed(&error))?;

    let mut reply = String::new();
    BufReader::new(stream.take(MAX_REPLY)).read_line(&mut reply).map_err(|error| failed(&error))?;
    if reply.is_empty() {
        return Err(failed(&"no answer"));
    }
    serde_json::from_str(&reply).map_err(|error| {
        CniError::new(IO, format!("mesh-agent's answer is not understood; are both of one version? {error}"))
    })
}
