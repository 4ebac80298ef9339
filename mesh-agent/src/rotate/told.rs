//! What is told of the rotation: status, and issues. Pure.

use std::time::Duration;

use keyservice::rotation::{Blocked, Machine, Settings, Slot, Waiting, device_of};
use mesh_api::defaults::DEVICES;
use mesh_api::status::{self, Issue, KeyStatus, RotationStatus, WaitingPeer};

/// Beside the machine.
pub(super) struct Context<'a> {
    pub(super) settings: &'a Settings,
    /// UDP port of the first device.
    pub(super) port: u16,
    /// The time since 1970.
    pub(super) wall: Duration,
    pub(super) settled: bool,
    pub(super) completed: u64,
    /// Why the secret cannot be had.
    pub(super) trouble: Option<&'a str>,
}

pub(super) fn rotation(machine: &Machine, context: &Context<'_>) -> RotationStatus {
    let state = machine.state();
    let key = |slot: &Slot| KeyStatus {
        epoch: slot.epoch,
        public_key: slot.public_key.to_string(),
        device: DEVICES[device_of(slot.epoch)].to_owned(),
        port: context.port.saturating_add(u16::from(device_of(slot.epoch) > 0)),
        announced: slot.announced,
        preshared: slot.preshared,
    };
    let age = context.wall.saturating_sub(Duration::from_secs(state.began));
    let age = state.newest().filter(|_| state.began > 0).map(|_| age);
    let due = context.settings.interval.zip(age).map(|(interval, age)| interval.saturating_sub(age));
    RotationStatus {
        phase: state.phase().word().to_owned(),
        keys: state.slots.iter().map(key).collect(),
        age_seconds: age.map(|age| age.as_secs()),
        rotation_epoch: context.settings.rotation_epoch,
        due_seconds: due.map(|due| due.as_secs()),
        completed: context.completed,
        waiting: machine.waiting().iter().map(|(name, why)| waiting(name, *why)).collect(),
        blocked: machine.blocked().map(|why| blocked(why, context.trouble)),
        settled: context.settled,
    }
}

fn waiting(name: &str, why: Waiting) -> WaitingPeer {
    let (reason, message) = match why {
        Waiting::NotBegun => ("NotBegun", "it does not announce a key of the new epoch yet"),
        Waiting::NoHandshake => ("NoHandshake", "no handshake with its new key is complete yet"),
        Waiting::NotMoved => ("NotMoved", "it still announces its old key, so it may send from it"),
    };
    WaitingPeer { name: name.to_owned(), reason: reason.to_owned(), message: message.to_owned() }
}

fn blocked(why: Blocked, trouble: Option<&str>) -> status::Blocked {
    let (reason, message) = match why {
        Blocked::NoDevice(number) => {
            let name = DEVICES[number % 2];
            ("NoDevice", format!("device {name} is not there: is mesh-datapath@{name} running?"))
        }
        Blocked::NoSecret => {
            ("NoSecret", format!("the secret cannot be had: {}", trouble.unwrap_or("it was not read yet")))
        }
    };
    status::Blocked { reason: reason.to_owned(), message }
}

/// An epoch that is asked for and does not begin.
pub(super) fn issue(blocked: &status::Blocked) -> Issue {
    Issue {
        object: "rotation of keys".to_owned(),
        field: String::new(),
        reason: blocked.reason.clone(),
        message: format!("the next epoch does not begin: {}", blocked.message),
    }
}
