//! A device into a [`State`] and out of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_noise::export;
use mesh_uapi::{Op, PeerUpdate};
use zeroize::Zeroizing;

use super::state::{PeerState, SessionState, State};
use crate::configure::Refusal;
use crate::counters::{Counters, Drop};
use crate::device::{Device, Entry, Member};
use crate::peer::{Now, Peer, Traffic};
use crate::session::Session;

/// How much of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// What was configured, and where the peers were last.
    Configuration,
    /// That, and everything that packets and handshakes left. Whoever exports it must not seal with it any more.
    Everything,
}

impl Device {
    /// What there is to tell; the sockets' part is the caller's.
    pub fn export(&self, now: Now, extent: Extent) -> State {
        let tables = self.read();
        let mut peers: Vec<_> =
            tables.peers.values().map(|member| self.export_peer(now, member, extent)).collect();
        peers.sort_by_key(|peer| peer.key);
        State {
            private_key: tables.identity.as_ref().map(|identity| identity.key.expose()),
            drops: export_drops(&self.drops),
            peers,
            ..State::default()
        }
    }

    fn export_peer(&self, now: Now, Member { peer, allowed_ips }: &Member, extent: Extent) -> PeerState {
        let state = peer.lock();
        let mut told = PeerState {
            key: *peer.key.as_bytes(),
            preshared_key: state.preshared_key.as_ref().map(|key| Zeroizing::new(*key.expose())),
            endpoint: peer.endpoint(),
            keepalive: state.timers.keepalive,
            allowed_ips: allowed_ips.iter().copied().collect(),
            ..PeerState::default()
        };
        if extent == Extent::Configuration {
            return told;
        }
        let ms = self.ms(now.instant);
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        told.timestamps = state.remote.as_ref().map(export::timestamps);
        told.traffic = counts(&peer.traffic).map(load);
        told.ages = times(&peer.traffic)
            .map(|time| Some(load(time)).filter(|at| *at > 0).map(|at| ms.saturating_sub(at)));
        let unix =
            |at: std::time::SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        told.last_handshake = state.last_handshake.map(unix);
        told.drops = export_drops(&peer.drops);
        let sessions = &state.sessions;
        told.sessions = [&sessions.current, &sessions.previous, &sessions.next].map(|session| {
            session.as_ref().map(|session| SessionState {
                age: now.instant.saturating_duration_since(session.born).as_millis() as u64,
                confirmed: session.is_confirmed(),
                keypair: export::keypair(&session.keypair, &session.window()),
            })
        });
        told.staged = state.staged.iter().cloned().collect();
        told
    }

    /// Takes a state over: to be called on a device without a key or peers. What was configured comes first, so a
    /// session that makes no sense costs a handshake only.
    pub fn import(&self, state: &State, now: Now) -> Result<(), Refusal> {
        let key = state.private_key.as_ref().map(|key| Op::SetPrivateKey(PrivateKey::from_bytes(key)));
        let peers = state.peers.iter().map(|peer| {
            let update = PeerUpdate {
                preshared_key: peer.preshared_key.as_ref().map(|key| PresharedKey::from_bytes(**key)),
                endpoint: peer.endpoint,
                persistent_keepalive: Some(peer.keepalive),
                add_allowed_ips: peer.allowed_ips.iter().copied().collect(),
                ..PeerUpdate::default()
            };
            Op::SetPeer(PublicKey::from_bytes(peer.key), update)
        });
        self.apply(&key.into_iter().chain(peers).collect::<Vec<_>>())?;
        import_drops(&self.drops, &state.drops);
        let members: std::collections::HashMap<_, _> =
            self.read().peers.iter().map(|(key, member)| (*key, member.peer.clone())).collect();
        for told in &state.peers {
            if let Some(peer) = members.get(&PublicKey::from_bytes(told.key)) {
                self.import_peer(peer, told, now);
            }
        }
        Ok(())
    }

    fn import_peer(&self, peer: &Arc<Peer>, told: &PeerState, now: Now) {
        let ms = self.ms(now.instant);
        let mut state = peer.lock();
        if let (Some(remote), Some(timestamps)) = (&mut state.remote, &told.timestamps) {
            export::restore_timestamps(remote, timestamps);
        }
        for (number, value) in counts(&peer.traffic).into_iter().zip(told.traffic) {
            number.store(value, Ordering::Relaxed);
        }
        for (time, age) in times(&peer.traffic).into_iter().zip(told.ages) {
            time.store(age.map_or(0, |age| ms.saturating_sub(age).max(1)), Ordering::Relaxed);
        }
        state.last_handshake = told.last_handshake.map(|at| UNIX_EPOCH + Duration::from_nanos(at));
        import_drops(&peer.drops, &told.drops);
        state.staged = told.staged.iter().cloned().collect();
        let mut sessions = told.sessions.iter().map(|session| {
            let session = session.as_ref()?;
            let (keypair, window) = export::keypair_from(&session.keypair)?;
            // One that is older than this machine's clock has ended long ago.
            let born = now.instant.checked_sub(Duration::from_millis(session.age))?;
            let index = keypair.local_index;
            let taken = Arc::new(Session::new(keypair, window, born, self.cipher));
            if session.confirmed {
                taken.confirm();
            }
            self.indices().replace(index, Entry { peer: peer.clone(), session: Some(taken.clone()) });
            Some(taken)
        });
        state.sessions.current = sessions.next().flatten();
        state.sessions.previous = sessions.next().flatten();
        state.sessions.next = sessions.next().flatten();
        if let Some(current) = &state.sessions.current {
            peer.sending.store(Some(current.clone()));
            // There is a session, so nobody has to be told that we are here.
            state.timers.keepalive_now = false;
        }
    }
}

fn counts(traffic: &Traffic) -> [&AtomicU64; 6] {
    let Traffic { rx_bytes, tx_bytes, rx_packets, tx_packets, handshakes, initiations, .. } = traffic;
    [rx_bytes, tx_bytes, rx_packets, tx_packets, handshakes, initiations]
}

fn times(traffic: &Traffic) -> [&AtomicU64; 4] {
    [&traffic.last_sent, &traffic.last_received, &traffic.unanswered_since, &traffic.owed_since]
}

fn export_drops(counters: &Counters) -> Vec<(String, u64)> {
    counters.by_name(false).into_iter().collect()
}

/// Reasons that this version does not have are left out.
fn import_drops(counters: &Counters, told: &[(String, u64)]) {
    for (name, count) in told {
        if let Some(reason) = Drop::ALL.iter().find(|reason| reason.name() == name) {
            counters.add(*reason, *count);
        }
    }
}
