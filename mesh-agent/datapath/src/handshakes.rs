//! Handshakes of the device: who may begin one, what comes of it, and which session is in use then.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_noise::message::{HEADER, cookie_receiver, response_receiver};
use mesh_noise::{Datagram, HandshakeError, Keypair, Window, classify, open_initiation};
use rand::CryptoRng;

use crate::counters::Drop;
use crate::device::{Device, Entry, Identity};
use crate::gate::{Gate, Verdict};
use crate::ip_packet::padded_length;
use crate::outbox::Outbox;
use crate::peer::{MAX_STAGED, Now, Peer, State};
use crate::session::Session;

/// Senders of stray packets that we look for in a second: after a crash, as many peers may wait for us.
const STRAYS: usize = 1024;
/// A session that received something this recently is not one that the peer lost, in milliseconds.
const ALIVE: u64 = 5_000;

impl Device {
    /// Asks the gate about a handshake message; a cookie reply goes straight back. Cookie replies themselves need no
    /// leave: they cost little.
    pub(crate) fn pass(
        &self,
        now: Now,
        from: SocketAddr,
        message: &[u8],
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let identity = self.read().identity.clone().ok_or(Drop::NoKey)?;
        match classify(message) {
            Ok(Datagram::CookieReply(reply)) => return self.known(cookie_receiver(reply)).map(drop),
            Ok(Datagram::Response(response)) => drop(self.known(response_receiver(response))?),
            _ => {}
        }
        let mut gate = self.gate();
        let gate = gate.get_or_insert_with(|| Gate::new(now.instant, rng));
        match gate.check(&identity.noise, now.instant, from, message, rng) {
            Verdict::Pass => Ok(()),
            Verdict::Drop(reason) => Err(reason),
            Verdict::Cookie(reply) => {
                out.network.push(&reply, from);
                Err(Drop::CookieDemanded)
            }
        }
    }

    fn known(&self, index: u32) -> Result<Arc<Peer>, Drop> {
        let indices = self.indices.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        indices.get(index).map(|entry| entry.peer.clone()).ok_or(Drop::UnknownIndex)
    }

    /// Works on a handshake message that [`Device::pass`] let through.
    pub(crate) fn handle_handshake(
        &self,
        now: Now,
        from: SocketAddr,
        message: &[u8],
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) {
        let (peer, result) = match classify(message) {
            Ok(Datagram::Initiation(message)) => match self.answer(now, from, message, rng, out) {
                Ok(()) => return,
                Err((peer, reason)) => (peer, Err(reason)),
            },
            Ok(Datagram::Response(response)) => match self.known(response_receiver(response)) {
                Ok(peer) => {
                    let result = self.complete(now, from, &peer, response, out);
                    (Some(peer), result)
                }
                Err(reason) => (None, Err(reason)),
            },
            Ok(Datagram::CookieReply(reply)) => match self.known(cookie_receiver(reply)) {
                Ok(peer) => {
                    let mut state = peer.lock();
                    let taken = state.remote.as_mut().map(|remote| remote.accept_cookie(reply, now.instant));
                    drop(state);
                    let result = taken.unwrap_or(Err(HandshakeError::Unexpected)).map_err(reason);
                    (Some(peer), result)
                }
                Err(reason) => (None, Err(reason)),
            },
            _ => (None, Err(Drop::UnknownType)),
        };
        match (result, peer) {
            (Err(reason), Some(peer)) => self.count(&peer, reason, 1),
            (Err(reason), None) => self.drops.count(reason),
            (Ok(()), _) => {}
        }
    }

    /// Answers an initiation.
    fn answer(
        &self,
        now: Now,
        from: SocketAddr,
        message: &[u8; 148],
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) -> Result<(), (Option<Arc<Peer>>, Drop)> {
        let identity = self.read().identity.clone().ok_or((None, Drop::NoKey))?;
        let opened = open_initiation(&identity.noise, message).map_err(|e| (None, reason(e)))?;
        let peer = self.read().peers.get(&opened.peer()).map(|member| member.peer.clone());
        let peer = peer.ok_or((None, Drop::UnknownPeer))?;
        let mut state = peer.lock();
        let failed = |reason| (Some(peer.clone()), reason);
        let Some(remote) = state.remote.as_mut() else { return Err(failed(Drop::NoKey)) };
        let entry = Entry { peer: peer.clone(), session: None };
        let index = self.indices().insert(entry, rng).ok_or_else(|| failed(Drop::QueueFull))?;
        let (response, keypair) = match remote.respond(&identity.noise, opened, index, now.instant, rng) {
            Ok(answer) => answer,
            Err(error) => {
                self.indices().remove(index);
                return Err(failed(reason(error)));
            }
        };
        let session = self.new_session(&peer, keypair, now);
        if let Some(unused) = state.sessions.next.replace(session) {
            self.indices().remove(unused.keypair.local_index);
        }
        // Answered where it came from. The endpoint moves with the first packet of the session: an initiation can be
        // replayed to a device that was just started, a packet in reply cannot.
        out.network.push(&response, from);
        if peer.endpoint().is_none() {
            peer.set_endpoint(from);
        }
        let ms = self.ms(now.instant);
        peer.traffic.received(ms, 1, message.len(), false);
        peer.traffic.sent(ms, 1, response.len(), false);
        Ok(())
    }

    fn new_session(&self, peer: &Arc<Peer>, keypair: Keypair, now: Now) -> Arc<Session> {
        let index = keypair.local_index;
        let session = Arc::new(Session::new(keypair, Window::default(), now.instant, self.cipher));
        let entry = Entry { peer: peer.clone(), session: Some(session.clone()) };
        self.indices().replace(index, entry);
        session
    }

    /// Takes the response to our initiation.
    fn complete(
        &self,
        now: Now,
        from: SocketAddr,
        peer: &Arc<Peer>,
        response: &[u8; 92],
        out: &mut Outbox,
    ) -> Result<(), Drop> {
        let identity = self.read().identity.clone().ok_or(Drop::NoKey)?;
        let mut state = peer.lock();
        let remote = state.remote.as_mut().ok_or(Drop::NoKey)?;
        let keypair = remote.accept_response(&identity.noise, response).map_err(reason)?;
        let session = self.new_session(peer, keypair, now);
        let sessions = &mut state.sessions;
        // As the kernel does it: one that the peer began and never used is as good as the one in use.
        let (before, unused) = match sessions.next.take() {
            Some(next) => (Some(next), sessions.current.take()),
            None => (sessions.current.take(), None),
        };
        let gone = [std::mem::replace(&mut sessions.previous, before), unused];
        sessions.current = Some(session.clone());
        gone.into_iter().flatten().for_each(|old| self.indices().remove(old.keypair.local_index));
        peer.sending.store(Some(session));
        peer.set_endpoint(from);
        peer.traffic.received(self.ms(now.instant), 1, response.len(), false);
        state.began(now, peer);
        // The peer may not send before it has received something.
        if state.staged.is_empty() {
            self.send_keepalive(now, peer, out);
        }
        self.send_staged(now, peer, &mut state, out);
        Ok(())
    }

    /// The peer uses a session that it began.
    pub(crate) fn confirm(&self, now: Now, peer: &Arc<Peer>, session: &Arc<Session>, out: &mut Outbox) {
        let mut state = peer.lock();
        let sessions = &mut state.sessions;
        if !sessions.next.as_ref().is_some_and(|next| Arc::ptr_eq(next, session)) {
            return;
        }
        sessions.next = None;
        let before = sessions.current.replace(session.clone());
        if let Some(gone) = std::mem::replace(&mut sessions.previous, before) {
            self.indices().remove(gone.keypair.local_index);
        }
        peer.sending.store(Some(session.clone()));
        state.began(now, peer);
        self.send_staged(now, peer, &mut state, out);
    }

    /// Keeps a packet until there is a session; true if a handshake is to bring one.
    pub(crate) fn stage(&self, now: Now, peer: &Arc<Peer>, packet: Vec<u8>, out: &mut Outbox) -> bool {
        let mut state = peer.lock();
        if state.remote.is_none() || packet.len() > crate::peer::MAX_PLAINTEXT {
            let reason = if state.remote.is_none() { Drop::NoKey } else { Drop::Oversized };
            self.count(peer, reason, 1);
            return false;
        }
        if state.staged.len() >= MAX_STAGED {
            state.staged.pop_front();
            self.count(peer, Drop::QueueFull, 1);
        }
        state.staged.push_back(packet);
        self.send_staged(now, peer, &mut state, out);
        !state.staged.is_empty()
    }

    /// Sends what waited for a session.
    pub(crate) fn send_staged(&self, now: Now, peer: &Peer, state: &mut State, out: &mut Outbox) {
        let session = peer.sending.load_full().filter(|session| session.is_live(now.instant));
        let (Some(session), Some(endpoint)) = (session, peer.endpoint()) else { return };
        while let Some(packet) = state.staged.pop_front() {
            self.seal(now, peer, &session, endpoint, &packet, out);
        }
    }

    /// An empty packet, if there is a session.
    pub(crate) fn send_keepalive(&self, now: Now, peer: &Peer, out: &mut Outbox) -> bool {
        let session = peer.sending.load_full().filter(|session| session.is_live(now.instant));
        let (Some(session), Some(endpoint)) = (session, peer.endpoint()) else { return false };
        self.seal(now, peer, &session, endpoint, &[], out);
        true
    }

    fn seal(
        &self,
        now: Now,
        peer: &Peer,
        session: &Arc<Session>,
        endpoint: SocketAddr,
        packet: &[u8],
        out: &mut Outbox,
    ) {
        let Some(counter) = session.keypair.sending.reserve(1) else { return };
        let length = Outbox::datagram(padded_length(packet.len(), self.mtu()));
        let space = out.network.space(length);
        space.fill(0);
        space.iter_mut().skip(HEADER).zip(packet).for_each(|(to, from)| *to = *from);
        out.commit(length, endpoint, session, counter);
        peer.traffic.sent(self.ms(now.instant), 1, length, !packet.is_empty());
    }

    /// Begins a handshake unless one is under way, was begun a moment ago, or nobody could be reached.
    pub(crate) fn initiate(&self, now: Now, peer: &Arc<Peer>, rng: &mut impl CryptoRng, out: &mut Outbox) {
        peer.wanted.store(false, Ordering::Relaxed);
        let Some(identity) = self.read().identity.clone() else { return };
        let mut state = peer.lock();
        if state.timers.may_begin(now.instant) {
            self.send_initiation(now, &identity, peer, &mut state, rng, out);
        }
    }

    /// Sends an initiation, the first one or once more.
    pub(crate) fn send_initiation(
        &self,
        now: Now,
        identity: &Identity,
        peer: &Arc<Peer>,
        state: &mut State,
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) {
        let State { remote: Some(remote), timers, .. } = state else { return };
        let Some(endpoint) = peer.endpoint() else { return };
        let mut indices = self.indices();
        if let Some(index) = remote.pending_index() {
            indices.remove(index);
        }
        let Some(index) = indices.insert(Entry { peer: peer.clone(), session: None }, rng) else { return };
        drop(indices);
        // Refused only for a key of low order, which no peer has.
        let Ok(message) = remote.initiate(&identity.noise, index, now.instant, now.wall, rng) else { return };
        out.network.push(&message, endpoint);
        timers.initiated(now.instant, rng);
        peer.traffic.initiations.fetch_add(1, Ordering::Relaxed);
        peer.traffic.sent(self.ms(now.instant), 1, message.len(), false);
    }

    /// Whether data for a session that we do not have is worth a look at who sent it: once a second for each sender.
    pub(crate) fn minds_stray(&self, now: Now, from: SocketAddr) -> bool {
        let second = self.ms(now.instant) / 1000;
        let mut strays = self.strays.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if strays.second != second {
            strays.second = second;
            strays.senders.clear();
        }
        strays.senders.len() < STRAYS && strays.senders.insert(from)
    }

    /// Data came for a session that we do not have. If a peer is known to be there, and nothing of it gets through,
    /// it uses one that we lost: a new handshake ends that at once.
    pub(crate) fn handle_stray(
        &self,
        now: Now,
        from: SocketAddr,
        rng: &mut impl CryptoRng,
        out: &mut Outbox,
    ) {
        let ms = self.ms(now.instant);
        let lost = |peer: &&Arc<Peer>| {
            let last = peer.traffic.last_received.load(Ordering::Relaxed);
            peer.endpoint() == Some(from) && (last == 0 || last + ALIVE < ms)
        };
        let peers: Vec<_> =
            self.read().peers.values().map(|member| &member.peer).filter(lost).cloned().collect();
        peers.iter().for_each(|peer| self.initiate(now, peer, rng, out));
    }
}

impl State {
    /// A session is known to both.
    fn began(&mut self, now: Now, peer: &Peer) {
        peer.traffic.handshakes.fetch_add(1, Ordering::Relaxed);
        self.last_handshake = Some(now.wall);
        self.timers.completed();
    }
}

fn reason(error: HandshakeError) -> Drop {
    match error {
        HandshakeError::Auth | HandshakeError::LowOrder => Drop::BadAuth,
        HandshakeError::Stale => Drop::StaleHandshake,
        HandshakeError::Flood => Drop::RateLimited,
        HandshakeError::Unexpected => Drop::Unexpected,
    }
}
