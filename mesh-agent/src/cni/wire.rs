//! One request off a connection: a JSON line, with at most one descriptor beside it, within limits.

#![allow(unsafe_code)] // A descriptor received by SCM_RIGHTS is a bare number until it is owned.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use mesh_api::cni::{Reply, Request};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;

use super::refusal::Refusal;

/// Bytes in a request; GC's list of a full node is a tenth of it.
const MAX_REQUEST: usize = 1 << 20;
/// For the whole request to arrive, and for the answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads the request line and the descriptor.
pub(super) async fn receive(stream: &UnixStream) -> Result<(Request, Option<OwnedFd>), Refusal> {
    let (line, descriptor) = tokio::time::timeout(PATIENCE, read_line(stream))
        .await
        .map_err(|_| Refusal::decode(format!("no whole request within {} s", PATIENCE.as_secs())))??;
    Ok((decode(&line)?, descriptor))
}

/// A request from its JSON.
pub(super) fn decode(line: &[u8]) -> Result<Request, Refusal> {
    serde_json::from_slice(line).map_err(|error| Refusal::decode(format!("request: {error}")))
}

async fn read_line(stream: &UnixStream) -> Result<(Vec<u8>, Option<OwnedFd>), Refusal> {
    let mut line = Vec::new();
    let mut descriptor = None;
    loop {
        let (bytes, descriptors) = stream
            .async_io(Interest::READABLE, || read_some(stream))
            .await
            .map_err(|error| Refusal::io(format!("request: {error}")))?;
        for received in descriptors {
            if descriptor.replace(received).is_some() {
                return Err(Refusal::decode("request: more than one descriptor"));
            }
        }
        if bytes.is_empty() {
            return Err(Refusal::decode("request: the connection ended before its line did"));
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
        if line.len() > MAX_REQUEST {
            return Err(Refusal::decode(format!("request: longer than {MAX_REQUEST} bytes")));
        }
        if end.is_some() {
            return Ok((line, descriptor));
        }
    }
}

fn read_some(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0u8; 16 << 10];
    let mut control = cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let length = received.bytes;
    buffer.truncate(length);
    Ok((buffer, descriptors))
}

/// Writes the reply line.
pub(super) async fn answer(stream: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let write = async {
        stream.write_all(&line).await?;
        stream.shutdown().await
    };
    tokio::time::timeout(PATIENCE, write).await.unwrap_or_else(|late| Err(late.into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    const REQUEST: &[u8] = br#"{"command":"ADD","containerId":"c1","ifname":"eth0","netns":"/run/netns/c1",
        "network":"margay","podNamespace":"default","podName":"web","podUid":"u","ips":["10.1.1.2","fd00::2"],
        "validAttachments":[["c1","eth0"]]}"#;

    #[test]
    fn an_unknown_field_and_a_missing_one_are_named() {
        let error = |line: &[u8]| decode(line).unwrap_err().to_string();
        assert!(error(br#"{"command":"ADD","network":"n","speed":9}"#).contains("unknown field `speed`"));
        assert!(error(br#"{"command":"ADD"}"#).contains("missing field `network`"));
        assert!(error(br#"{"command":"NAP","network":"n"}"#).contains("unknown variant `NAP`"));
        assert!(error(br#"{"command":"ADD","network":"n","ips":["10.1.1.300"]}"#).contains("IP address"));
    }

    proptest! {
        #[test]
        fn any_line_is_a_request_or_an_error_with_a_number(line in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Err(refusal) = decode(&line) {
                prop_assert_eq!(refusal.code, 6);
            }
        }

        #[test]
        fn a_damaged_request_is_understood_the_same_way_twice(
            at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()
        ) {
            let mut line = REQUEST.to_vec();
            let at = at.index(line.len());
            line[at] = byte;
            line.truncate(cut.index(line.len() * 4).min(line.len()));
            if let Ok(request) = decode(&line) {
                let again = decode(&serde_json::to_vec(&request).unwrap());
                prop_assert_eq!(again, Ok(request));
            }
        }
    }
}
