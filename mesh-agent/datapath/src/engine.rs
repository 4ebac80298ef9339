//! Runs a device on its TUN and its sockets: a thread each for packets out (TUN read, seal, send), packets
//! in (receive, open, TUN write), and time.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use mesh_uapi::Op;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::batch::{Batch, Outbox, Run};
use crate::configure::{self, Refusal, SocketChange};
use crate::counters::Drop;
use crate::device::Device;
use crate::offload::Offload;
use crate::offload::coalesce::coalesce;
use crate::offload::split::{SuperPacket, complete_checksum};
use crate::offload::vnet_header::VnetHeader;
use crate::peer::Now;
use crate::tun::{Large, Tun};
use crate::udp::{self, Sockets};

/// Reads before what they caused is sent.
const BATCH: usize = 64;
/// Packets that wait to be sent before no more is read: about what one send or write holds.
const FULL: usize = 64;
/// Room for padding behind a packet.
const PADDING: usize = 16;
/// Any packet with its header, or datagram, and room for padding.
const BUFFER: usize = VnetHeader::SIZE + 65_536 + PADDING;
/// How often time passes for the peers.
const TICK: Duration = Duration::from_millis(250);

/// Why the device ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The interface was deleted.
    InterfaceDeleted,
    /// The UAPI socket's file was removed: how one asks a userspace device to go.
    SocketRemoved,
    /// A signal, by its name.
    Signal(&'static str),
    /// Nothing can be done any more.
    Failed(String),
}

/// A request that was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The core refuses it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The sockets cannot be made so.
    #[error("listen_port or fwmark: {0}")]
    Sockets(#[from] io::Error),
}

impl ApplyError {
    /// For the reply, positive.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Refused(_) => libc::EINVAL,
            Self::Sockets(e) => e.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// A device with its TUN and sockets.
pub struct Engine {
    /// The core.
    pub device: Device,
    tun: Tun,
    offload: Offload,
    sockets: RwLock<Arc<Sockets>>,
    /// Wakes the receiver when the sockets change.
    wake: PipeWriter,
    woken: PipeReader,
    /// One request at a time.
    configuring: Mutex<()>,
}

/// The clock, read once a step.
pub fn now() -> Now {
    Now { instant: Instant::now(), wall: SystemTime::now() }
}

impl Engine {
    /// A device without a key on `tun` and `sockets`.
    pub fn new(tun: Tun, sockets: Sockets, offload: Offload) -> io::Result<Arc<Self>> {
        let (woken, wake) = io::pipe()?;
        let device = Device::default();
        device.set_mtu(tun.mtu()?);
        let sockets = RwLock::new(Arc::new(sockets));
        Ok(Arc::new(Self { device, tun, offload, sockets, wake, woken, configuring: Mutex::new(()) }))
    }

    /// The TUN.
    pub fn tun(&self) -> &Tun {
        &self.tun
    }

    /// The sockets as they are now.
    pub fn sockets(&self) -> Arc<Sockets> {
        self.sockets.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Applies a request: all of it, or nothing.
    pub fn apply(&self, ops: &[Op]) -> Result<(), ApplyError> {
        let _one = self.configuring.lock().unwrap_or_else(PoisonError::into_inner);
        configure::check(ops)?;
        self.change_sockets(SocketChange::of(ops))?;
        self.device.apply(ops, Instant::now(), &mut rand::rng())?;
        Ok(())
    }

    fn change_sockets(&self, change: SocketChange) -> io::Result<()> {
        let current = self.sockets();
        let fwmark = change.fwmark.unwrap_or(current.fwmark);
        let sockets = match change.port {
            Some(port) if port != current.port => Sockets::bind(port, fwmark, self.offload.udp)?,
            _ if fwmark != current.fwmark => current.with_fwmark(fwmark)?,
            _ => return Ok(()),
        };
        *self.sockets.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(sockets);
        (&self.wake).write_all(&[0])
    }

    /// Starts the threads. The reason they end for, if they do, comes through `exit`.
    pub fn start(self: &Arc<Self>, exit: &Sender<Exit>) -> io::Result<()> {
        type Job = fn(&Engine) -> Exit;
        let jobs: [(&str, Job); 3] =
            [("tx", Engine::transmit), ("rx", Engine::receive), ("timer", Engine::tick)];
        for (name, job) in jobs {
            let (engine, exit) = (self.clone(), exit.clone());
            thread::Builder::new().name(name.to_owned()).spawn(move || {
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(&engine)));
                let _ = exit.send(result.unwrap_or_else(|_| Exit::Failed(format!("thread {name} panicked"))));
            })?;
        }
        Ok(())
    }

    /// TUN to network.
    fn transmit(&self) -> Exit {
        let (mut buffer, mut segment) = (vec![0; BUFFER], vec![0; BUFFER]);
        let mut out = Outbox::default();
        loop {
            if let Err(e) = wait(&mut [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN)]) {
                return Exit::Failed(format!("poll on the TUN: {e}"));
            }
            let now = now();
            for _ in 0..BATCH {
                match self.tun.read(buffer.get_mut(..BUFFER - PADDING).unwrap_or_default()) {
                    Ok((header, Range { start, end })) => {
                        let packet = buffer.get_mut(start..).unwrap_or_default();
                        if self.seal(now, &header, (packet, end - start), &mut segment, &mut out).is_none() {
                            self.device.drops.count(Drop::BadPacket);
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // The interface is gone from under the descriptor.
                    Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return Exit::InterfaceDeleted,
                    Err(e) => return Exit::Failed(format!("read from the TUN: {e}")),
                }
                if out.network.len() >= FULL {
                    self.flush(&mut out);
                }
            }
            self.flush(&mut out);
        }
    }

    /// Hands the device a packet from the TUN, the first `length` bytes of `buffer`, with its checksum complete;
    /// a large one piece by piece. `None` if it is not what its header says.
    fn seal(
        &self,
        now: Now,
        header: &VnetHeader,
        (buffer, length): (&mut [u8], usize),
        segment: &mut [u8],
        out: &mut Outbox,
    ) -> Option<()> {
        let packet = buffer.get_mut(..length)?;
        if !header.is_segmented() {
            complete_checksum(header, packet)?;
            self.device.handle_packet(now, buffer, length, out);
            return Some(());
        }
        let large = SuperPacket::parse(header, packet)?;
        for n in 0..large.count() {
            let length = large.write(n, segment)?;
            self.device.handle_packet(now, segment, length, out);
        }
        Some(())
    }

    /// Network to TUN.
    fn receive(&self) -> Exit {
        let mut buffer = vec![0; BUFFER];
        let mut out = Outbox::default();
        let mut sockets = self.sockets();
        loop {
            let mut ready: Vec<PollFd<'_>> = std::iter::once(self.woken.as_fd())
                .chain(sockets.all().map(AsFd::as_fd))
                .map(|fd: BorrowedFd<'_>| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            if let Err(e) = wait(&mut ready) {
                return Exit::Failed(format!("poll on the sockets: {e}"));
            }
            let woken = ready.first().and_then(PollFd::any).unwrap_or(false);
            let now = now();
            for socket in sockets.all() {
                for _ in 0..BATCH {
                    match udp::receive(socket, &mut buffer) {
                        Ok((from, length, segment)) => {
                            let datagrams = buffer.get(..length).unwrap_or_default();
                            for datagram in (Run { bytes: datagrams, segment, to: &from }).packets() {
                                self.device.handle_datagram(now, from, datagram, &mut out);
                            }
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                        // An error that ICMP left on the socket: reported once, and of no use here.
                        Err(e) => tracing::debug!("receive: {e}"),
                    }
                    if out.tun.len() >= FULL {
                        self.flush(&mut out);
                    }
                }
            }
            self.flush(&mut out);
            if woken {
                let _ = (&self.woken).read(&mut [0; 64]);
                sockets = self.sockets();
            }
        }
    }

    /// Time.
    fn tick(&self) -> Exit {
        let mut out = Outbox::default();
        let mut rng = rand::rng();
        loop {
            let now = now();
            match self.tun.mtu() {
                Ok(mtu) => self.device.set_mtu(mtu),
                // Deleted, which the reader sees too, or moved to another namespace: the last one stays.
                Err(e) => tracing::trace!("{}: MTU: {e}", self.tun.name()),
            }
            let early = self.device.tick(now, &mut rng, &mut out);
            self.flush(&mut out);
            let pause = early.map_or(TICK, |at| at.saturating_duration_since(now.instant).min(TICK));
            thread::sleep(pause.max(Duration::from_millis(1)));
        }
    }

    fn flush(&self, out: &mut Outbox) {
        self.send(&out.network);
        let packets = out.tun.iter().map(|(packet, ())| packet);
        match self.tun.large() {
            Large::No => packets.for_each(|packet| self.deliver(packet)),
            large => {
                for burst in coalesce(packets, large == Large::TcpAndUdp) {
                    let joined =
                        burst.head().is_some_and(|head| self.tun.write_joined(&head, &burst).is_ok());
                    if !joined {
                        burst.packets().for_each(|packet| self.deliver(packet));
                    }
                }
            }
        }
        out.clear();
    }

    fn deliver(&self, packet: &[u8]) {
        if self.tun.write(packet).is_err() {
            self.device.drops.count(Drop::TunWriteFailed);
        }
    }

    fn send(&self, batch: &Batch<std::net::SocketAddr>) {
        if batch.is_empty() {
            return;
        }
        let sockets = self.sockets();
        for run in batch.runs() {
            if let Err((failed, e)) = sockets.send(&run) {
                tracing::debug!("send to {}: {e}", run.to);
                self.device.drops.add(Drop::SendFailed, failed);
            }
        }
    }
}

/// Waits until one is ready, or in error.
fn wait(fds: &mut [PollFd<'_>]) -> nix::Result<()> {
    loop {
        match poll(fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}
