//! Two processes and one device: the running one stops, tells everything, passes its descriptors and waits for a word;
//! only when that comes does it end for good. Until the new one was told to go, it seals nothing, so no number is
//! ever used twice; if it falls silent, the old one goes on as if nothing had been.
//!
//! ```text
//! new: connects
//! old: stops its threads; "MGYD" and which sockets there are, with the descriptors of
//!      the state (a sealed memory file), the TUN, the UAPI's listener, UDP over IPv4 and IPv6
//! new: takes it all over; "R"
//! old: "G", and ends
//! new: starts its threads
//! ```
//!
//! Meanwhile packets wait in the TUN's queue and the sockets' buffers.
#![allow(unsafe_code)] // Descriptors that arrived belong to nobody else: the one place that says so.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _};
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use zeroize::Zeroizing;

use super::state::State;

const HELLO: &[u8; 4] = b"MGYD";
const READY: u8 = b'R';
const GO: u8 = b'G';
/// How long one waits for the other. The packets' queues hold about as much.
const PATIENCE: Duration = Duration::from_secs(2);
/// Descriptors at most.
const MAX_FDS: usize = 5;

/// Where the process that drives `interface` can be asked for it.
pub fn path(interface: &str) -> PathBuf {
    Path::new(mesh_uapi::client::SOCKET_DIR).join(format!("{interface}.handover"))
}

/// What a predecessor passed on.
#[derive(Debug)]
pub struct Inheritance {
    /// The conversation, for [`begin`].
    pub stream: UnixStream,
    /// What it told; `None` if it is of another version.
    pub state: Option<State>,
    /// The TUN.
    pub tun: OwnedFd,
    /// The UAPI's listener.
    pub listener: UnixListener,
    /// The UDP sockets.
    pub sockets: [Option<UdpSocket>; 2],
}

/// The descriptors that go along.
#[derive(Debug)]
pub struct Estate<'a> {
    /// The TUN.
    pub tun: BorrowedFd<'a>,
    /// The UAPI's listener.
    pub listener: BorrowedFd<'a>,
    /// UDP over IPv4 and over IPv6.
    pub sockets: [Option<&'a UdpSocket>; 2],
}

/// Asks whoever drives the device. `None` if nobody is there.
pub fn ask(path: &Path) -> io::Result<Option<Inheritance>> {
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "the running process said something else");
    let (hello, fds) = receive(&stream)?;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(broken);
    let (state, tun, listener) = (next()?, next()?, next()?);
    let [a, b, c, d, has_ipv4, has_ipv6] = hello;
    if [a, b, c, d] != *HELLO {
        return Err(broken());
    }
    let ipv4 = (has_ipv4 == 1).then(&mut next).transpose()?.map(UdpSocket::from);
    let ipv6 = (has_ipv6 == 1).then(&mut next).transpose()?.map(UdpSocket::from);
    let mut bytes = Zeroizing::new(Vec::new());
    let mut state = File::from(state);
    bytes.reserve_exact(usize::try_from(state.metadata()?.len()).unwrap_or_default());
    state.rewind()?;
    state.read_to_end(&mut bytes)?;
    let state = State::decode(&bytes);
    Ok(Some(Inheritance { stream, state, tun, listener: listener.into(), sockets: [ipv4, ipv6] }))
}

/// Says that everything was understood, and waits for leave to start. An error means that the old process goes
/// on: this one must end without having touched anything.
pub fn begin(mut stream: &UnixStream) -> io::Result<()> {
    stream.write_all(&[READY])?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    match answer {
        [GO] => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the running process goes on")),
    }
}

/// Whether the one who asks may have it: it runs as root, or as who we are.
pub fn may_ask(stream: &UnixStream) -> io::Result<bool> {
    let uid = getsockopt(stream, PeerCredentials)?.uid();
    Ok(uid == 0 || uid == nix::unistd::geteuid().as_raw())
}

/// Passes everything on. True if the other side has it now; the device must be stopped, and be started again on false
/// and on an error.
pub fn give(mut stream: &UnixStream, state: &State, estate: &Estate<'_>) -> io::Result<bool> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let memory = memory(&state.encode())?;
    let [ipv4, ipv6] = estate.sockets;
    let hello = [HELLO.as_slice(), &[ipv4.is_some().into(), ipv6.is_some().into()]].concat();
    let mut fds = vec![memory.as_raw_fd(), estate.tun.as_raw_fd(), estate.listener.as_raw_fd()];
    fds.extend(ipv4.into_iter().chain(ipv6).map(|socket| socket.as_raw_fd()));
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&hello)], &control, MsgFlags::MSG_NOSIGNAL, None)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer != [READY] {
        return Ok(false);
    }
    stream.write_all(&[GO])?;
    Ok(true)
}

/// A file that is only in memory and that nobody can change any more.
fn memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let memory = memfd_create(c"margay-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(memory);
    file.write_all(bytes)?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

fn receive(stream: &UnixStream) -> io::Result<([u8; 6], Vec<OwnedFd>)> {
    let mut hello = [0; 6];
    let mut control = cmsg_space!([i32; MAX_FDS]);
    let mut vectors = [IoSliceMut::new(&mut hello)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut vectors, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel made these descriptors for us in this very call.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    match message.bytes {
        6 => Ok((hello, fds)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
