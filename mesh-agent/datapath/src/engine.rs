//! Runs a device on its TUN and its sockets: a thread each for packets out (TUN read, seal, send), packets
//! in (receive, open, TUN write), and everything slow: handshakes and time.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use mesh_uapi::{Op, Stats};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::batch::Batch;
use crate::configure::{self, Refusal, SocketChange};
use crate::counters::Drop;
use crate::device::{Device, Step};
use crate::handover::state::State;
use crate::handover::transfer::Extent;
use crate::offload::Offload;
use crate::offload::coalesce::coalesce;
use crate::offload::split::{SuperPacket, complete_checksum};
use crate::offload::vnet_header::VnetHeader;
use crate::outbox::{Event, Outbox};
use crate::peer::Now;
use crate::session::Cipher;
use crate::tun::{Large, Tun};
use crate::udp::Sockets;
use crate::udp::many::{self, MESSAGE, RECEIVED};

/// Reads before the sender looks whether anything else is to be done.
const BATCH: usize = 64;
/// Packets that wait to be sent before no more is read: about what one send holds.
const FULL: usize = 64;
/// Any packet with its header.
const BUFFER: usize = VnetHeader::SIZE + 65_536;
/// How often time passes for the peers.
const TICK: Duration = Duration::from_millis(250);
/// Handshakes that wait to be worked on; at 0.3 ms each they take as long as a retry.
const QUEUE: usize = 4096;
/// Handshakes between two looks at the clock.
const HANDSHAKES: usize = 32;

/// Why the device ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The interface was deleted.
    InterfaceDeleted,
    /// The UAPI socket's file was removed: how one asks a userspace device to go.
    SocketRemoved,
    /// Another process drives the device now.
    HandedOver,
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
    /// Wakes the receiver when the sockets change, and when it is to stop.
    wake_receiver: (PipeReader, PipeWriter),
    /// Wakes the sender when it is to stop.
    wake_sender: (PipeReader, PipeWriter),
    stopping: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// One request at a time.
    configuring: Mutex<()>,
    /// What the thread for everything slow is to do.
    slow: SyncSender<Event>,
    events: Mutex<Receiver<Event>>,
    /// Is told the configuration after each change.
    keeper: OnceLock<Keeper>,
}

/// Keeps a configuration for after a crash.
type Keeper = Box<dyn Fn(&State) -> io::Result<()> + Send + Sync>;

/// The clock, read once a step.
pub fn now() -> Now {
    Now { instant: Instant::now(), wall: SystemTime::now() }
}

impl Engine {
    /// A device without a key on `tun` and `sockets`.
    pub fn new(tun: Tun, sockets: Sockets, offload: Offload, cipher: Cipher) -> io::Result<Arc<Self>> {
        let device = Device::new(cipher);
        device.set_mtu(tun.mtu()?);
        let (slow, events) = sync_channel(QUEUE);
        Ok(Arc::new(Self {
            device,
            tun,
            offload,
            sockets: RwLock::new(Arc::new(sockets)),
            wake_receiver: io::pipe()?,
            wake_sender: io::pipe()?,
            stopping: AtomicBool::new(false),
            threads: Mutex::default(),
            configuring: Mutex::default(),
            slow,
            events: Mutex::new(events),
            keeper: OnceLock::new(),
        }))
    }

    /// The TUN.
    pub fn tun(&self) -> &Tun {
        &self.tun
    }

    /// The sockets as they are now.
    pub fn sockets(&self) -> Arc<Sockets> {
        self.sockets.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every number there is.
    pub fn stats(&self) -> Stats {
        let mut stats = self.device.stats();
        let tun = self.tun.offloads().map(|(name, state)| (name, state.clone()));
        let all = tun.chain(self.sockets().offloads());
        stats.offloads = all.map(|(name, state)| (name.to_owned(), state)).collect();
        stats
    }

    /// Applies a request: all of it, or nothing.
    pub fn apply(&self, ops: &[Op]) -> Result<(), ApplyError> {
        let one = self.configuring();
        configure::check(ops)?;
        self.change_sockets(SocketChange::of(ops))?;
        self.device.apply(ops)?;
        self.keep(&one);
        Ok(())
    }

    /// Nothing is configured while this is held.
    pub(crate) fn configuring(&self) -> MutexGuard<'_, ()> {
        self.configuring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells `keeper` the configuration, now and after each change.
    pub fn set_keeper(&self, keeper: Keeper) {
        let _ = self.keeper.set(keeper);
        self.keep(&self.configuring());
    }

    fn keep(&self, _: &MutexGuard<'_, ()>) {
        let Some(keeper) = self.keeper.get() else { return };
        if let Err(e) = keeper(&self.export(Extent::Configuration)) {
            tracing::warn!("{}: the configuration would not survive a crash: {e}", self.tun.name());
        }
    }

    /// What there is to tell about the device. Everything is only told once the threads were stopped.
    pub fn export(&self, extent: Extent) -> State {
        let sockets = self.sockets();
        let state = self.device.export(now(), extent);
        State { port: sockets.port, fwmark: sockets.fwmark, ..state }
    }

    /// Waits until no thread works on packets any more. They stay where they are; [`Engine::start`] goes on with them.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for (_, wake) in [&self.wake_receiver, &self.wake_sender] {
            let mut wake: &PipeWriter = wake;
            let _ = wake.write_all(&[0]);
        }
        let _ = self.slow.try_send(Event::Nothing);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic was told when it happened.
            let _ = thread.join();
        }
        self.stopping.store(false, Ordering::SeqCst);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
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
        let mut wake: &PipeWriter = &self.wake_receiver.1;
        wake.write_all(&[0])
    }

    /// Starts the threads. The reason they end for, if they do, comes through `exit`.
    pub fn start(self: &Arc<Self>, exit: &Sender<Exit>) -> io::Result<()> {
        type Job = fn(&Engine) -> Option<Exit>;
        let jobs: [(&str, Job); 3] =
            [("tx", Engine::transmit), ("rx", Engine::receive), ("slow", Engine::slow)];
        for (name, job) in jobs {
            let (engine, exit) = (self.clone(), exit.clone());
            let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(&engine)));
                let why = result.unwrap_or_else(|_| Some(Exit::Failed(format!("thread {name} panicked"))));
                // No reason: it was told to stop.
                if let Some(why) = why {
                    let _ = exit.send(why);
                }
            })?;
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(())
    }

    /// TUN to network.
    fn transmit(&self) -> Option<Exit> {
        let mut buffer = vec![0; BUFFER];
        let mut out = Outbox::default();
        loop {
            let mut ready = [self.wake_sender.0.as_fd(), self.tun.as_fd()].map(readable);
            if let Err(e) = wait(&mut ready) {
                return Some(Exit::Failed(format!("poll on the TUN: {e}")));
            }
            let mut more = true;
            while more {
                if self.is_stopping() {
                    drain(&self.wake_sender.0);
                    return None;
                }
                let now = now();
                let mut step = self.device.step(now);
                match self.read_packets(&mut step, &mut buffer, &mut out) {
                    Ok(full) => more = full,
                    Err(exit) => return Some(exit),
                }
                out.seal();
                drop(step);
                self.finish(now, &mut out);
            }
        }
    }

    /// Reads until there is enough to send; false if there is no more for now.
    fn read_packets(&self, step: &mut Step<'_>, buffer: &mut [u8], out: &mut Outbox) -> Result<bool, Exit> {
        for _ in 0..BATCH {
            match self.tun.read(buffer) {
                Ok((header, Range { start, end })) => {
                    let packet = buffer.get_mut(start..end).unwrap_or_default();
                    if split(step, &header, packet, out).is_none() {
                        self.device.drops.count(Drop::BadPacket);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The interface is gone from under the descriptor.
                Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return Err(Exit::InterfaceDeleted),
                Err(e) => return Err(Exit::Failed(format!("read from the TUN: {e}"))),
            }
            if out.network.len() >= FULL {
                break;
            }
        }
        Ok(true)
    }

    /// Network to TUN.
    fn receive(&self) -> Option<Exit> {
        let mut buffer = vec![0; RECEIVED * MESSAGE];
        let mut out = Outbox::default();
        let mut sockets = self.sockets();
        loop {
            let fds = std::iter::once(self.wake_receiver.0.as_fd()).chain(sockets.all().map(AsFd::as_fd));
            let mut ready: Vec<PollFd<'_>> = fds.map(readable).collect();
            if let Err(e) = wait(&mut ready) {
                return Some(Exit::Failed(format!("poll on the sockets: {e}")));
            }
            let woken = ready.first().and_then(PollFd::any).unwrap_or(false);
            let mut more = !woken;
            while more && !self.is_stopping() {
                more = false;
                for socket in sockets.all() {
                    more |= self.receive_some(socket, &mut buffer, &mut out);
                }
            }
            if woken {
                drain(&self.wake_receiver.0);
                sockets = self.sockets();
            }
            if self.is_stopping() {
                return None;
            }
        }
    }

    /// Takes what one call gives; true if there may be more.
    fn receive_some(&self, socket: &std::net::UdpSocket, buffer: &mut [u8], out: &mut Outbox) -> bool {
        let mut messages = [None; RECEIVED];
        let count = match many::receive(socket, buffer, &mut messages) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
            // An error that ICMP left on the socket: reported once, and of no use here.
            Err(e) => {
                tracing::debug!("receive: {e}");
                return true;
            }
        };
        let now = now();
        let mut step = self.device.step(now);
        for (n, message) in messages.iter().enumerate().take(count) {
            let Some(message) = message else { continue };
            let base = n * MESSAGE;
            let bytes = buffer.get_mut(base..base + message.length).unwrap_or_default();
            step.receive(message.from, base, bytes, message.segment, out);
        }
        drop(step);
        // A session that a packet has just confirmed must be there when the packet's answer wants it.
        self.act(now, out);
        self.deliver(buffer, &out.packets);
        out.packets.clear();
        count == RECEIVED
    }

    /// Handshakes and time.
    fn slow(&self) -> Option<Exit> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = Outbox::default();
        let mut rng = rand::rng();
        let mut due = Instant::now();
        loop {
            let event = match events.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    return Some(Exit::Failed("no thread is left".to_owned()));
                }
            };
            if self.is_stopping() {
                return None;
            }
            let now = now();
            for event in event.into_iter().chain(events.try_iter()).take(HANDSHAKES) {
                match event {
                    // Gate and limit were asked already.
                    Event::Message(from, message) => {
                        self.device.handle_handshake(now, from, message.bytes(), &mut rng, &mut out);
                    }
                    Event::Stray(from) => self.device.handle_stray(now, from, &mut rng, &mut out),
                    event => self.device.handle(now, event, &mut rng, &mut out),
                }
            }
            if due <= now.instant {
                match self.tun.mtu() {
                    Ok(mtu) => self.device.set_mtu(mtu),
                    // Deleted, which the reader sees too, or moved to another namespace: the last one stays.
                    Err(e) => tracing::trace!("{}: MTU: {e}", self.tun.name()),
                }
                let early = self.device.tick(now, &mut rng, &mut out);
                let pause = early.map_or(TICK, |at| at.saturating_duration_since(now.instant).min(TICK));
                due = now.instant + pause.max(Duration::from_millis(1));
            }
            out.seal();
            self.finish(now, &mut out);
        }
    }

    /// Sends the datagrams and passes on what is left to do.
    fn finish(&self, now: Now, out: &mut Outbox) {
        self.send(&out.network);
        out.network.clear();
        self.act(now, out);
    }

    /// Does what a step left over, and sends what comes of it.
    fn act(&self, now: Now, out: &mut Outbox) {
        if out.has_events() {
            self.sort(now, out);
            out.seal();
            self.send(&out.network);
            out.network.clear();
        }
    }

    /// Does what is quick, and hands the rest to the thread for it.
    fn sort(&self, now: Now, out: &mut Outbox) {
        let mut rng = rand::rng();
        for event in out.take_events() {
            let slow = match event {
                Event::Confirmed(peer, session) => {
                    self.device.confirm(now, &peer, &session, out);
                    continue;
                }
                Event::Stage(peer, packet) => {
                    let wanted = self.device.stage(now, &peer, packet, out);
                    if !wanted || peer.wanted.swap(true, Ordering::Relaxed) {
                        continue;
                    }
                    Event::Initiate(peer)
                }
                Event::Message(from, message) => {
                    if let Err(reason) = self.device.pass(now, from, message.bytes(), &mut rng, out) {
                        self.device.drops.count(reason);
                        continue;
                    }
                    event
                }
                // Else forged packets would fill the queue, and handshakes have no room in it.
                Event::Stray(from) if !self.device.minds_stray(now, from) => continue,
                Event::Stray(_) | Event::Initiate(_) | Event::Nothing => event,
            };
            if self.slow.try_send(slow).is_err() {
                self.device.drops.count(Drop::HandshakeQueueFull);
            }
        }
    }

    /// Packets to the TUN, which are these places of the buffer.
    fn deliver(&self, buffer: &[u8], places: &[Range<usize>]) {
        let packets = places.iter().filter_map(|place| buffer.get(place.clone()));
        match self.tun.large() {
            Large::No => packets.for_each(|packet| self.write(packet)),
            large => {
                for burst in coalesce(packets, large == Large::TcpAndUdp) {
                    let joined =
                        burst.head().is_some_and(|head| self.tun.write_joined(&head, &burst).is_ok());
                    if !joined {
                        burst.packets().for_each(|packet| self.write(packet));
                    }
                }
            }
        }
    }

    fn write(&self, packet: &[u8]) {
        if self.tun.write(packet).is_err() {
            self.device.drops.count(Drop::TunWriteFailed);
        }
    }

    fn send(&self, batch: &Batch<std::net::SocketAddr>) {
        if batch.is_empty() {
            return;
        }
        let sockets = self.sockets();
        let mut runs = batch.runs().peekable();
        while let Some(first) = runs.next() {
            let mut list = [first; many::SENT];
            let mut count = 1;
            for (place, run) in list.iter_mut().skip(1).zip(&mut runs) {
                *place = run;
                count += 1;
            }
            sockets.send(list.get(..count).unwrap_or_default(), |run, failed, e| {
                tracing::debug!("send to {}: {e}", run.to);
                self.device.drops.add(Drop::SendFailed, failed);
            });
        }
    }
}

/// Hands the core a packet from the TUN with its checksum complete; a large one piece by piece. `None` if it is not
/// what its header says.
fn split(step: &mut Step<'_>, header: &VnetHeader, packet: &mut [u8], out: &mut Outbox) -> Option<()> {
    if header.is_segmented() {
        return step.send_large(&SuperPacket::parse(header, packet)?, out);
    }
    complete_checksum(header, packet)?;
    step.send(packet, out);
    Some(())
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Takes the word that woke us.
fn drain(mut pipe: &PipeReader) {
    let _ = pipe.read(&mut [0; 64]);
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
