//! `meshctl keys`: this node's keys, and what a rotation waits for.

use mesh_api::status::{Ordered, RotationStatus};

use super::{age, table as new_table, text};

pub(crate) fn table(rotation: &RotationStatus) -> String {
    [head(rotation), keys(rotation), waiting(rotation)]
        .into_iter()
        .filter(|section| !section.is_empty())
        .collect::<Vec<_>>()
        .join("\n\n")
}

fn head(rotation: &RotationStatus) -> String {
    let settled = if rotation.settled { "" } else { ", being carried out" };
    let mut lines = vec![format!("Phase     {}{settled}", rotation.phase)];
    if let Some(seconds) = rotation.age_seconds {
        lines.push(format!("Began     {} ago", age(seconds)));
    }
    lines.push(match rotation.due_seconds {
        Some(0) => "Next      due".to_owned(),
        Some(seconds) => format!("Next      in {}", age(seconds)),
        None => "Next      no schedule".to_owned(),
    });
    lines.push(format!(
        "Wanted    epoch {} or later, {} completed here",
        rotation.rotation_epoch, rotation.completed
    ));
    if let Some(blocked) = &rotation.blocked {
        lines.push(format!("Blocked   {}: {}", blocked.reason, blocked.message));
    }
    lines.join("\n")
}

fn keys(rotation: &RotationStatus) -> String {
    if rotation.keys.is_empty() {
        return "No key".to_owned();
    }
    let mut out = new_table(&["EPOCH", "DEVICE", "PORT", "ANNOUNCED", "PRESHARED", "PUBLIC KEY"]);
    let word = |yes: bool| if yes { "yes" } else { "no" };
    for key in &rotation.keys {
        out.add_row(vec![
            key.epoch.to_string(),
            key.device.clone(),
            key.port.to_string(),
            word(key.announced).to_owned(),
            word(key.preshared).to_owned(),
            key.public_key.clone(),
        ]);
    }
    text(&out)
}

fn waiting(rotation: &RotationStatus) -> String {
    if rotation.waiting.is_empty() {
        return String::new();
    }
    let mut out = new_table(&["WAITING FOR", "REASON", "MESSAGE"]);
    for peer in &rotation.waiting {
        out.add_row(vec![&peer.name, &peer.reason, &peer.message]);
    }
    text(&out)
}

/// What was ordered, and what is in its way.
pub(crate) fn ordered(ordered: &Ordered) -> String {
    let what = match &ordered.file {
        Some(file) => format!("{file} asks all nodes for epoch {}", ordered.epoch),
        None => format!("this node goes to epoch {}", ordered.epoch),
    };
    match &ordered.blocked {
        Some(blocked) => format!("{what}, once this is over: {}", blocked.message),
        None => format!("{what}; `meshctl keys` shows how far it is"),
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::status::{Blocked, KeyStatus, WaitingPeer};

    use super::*;

    fn moving() -> RotationStatus {
        let key = |epoch: u64, device: &str, port| KeyStatus {
            epoch,
            public_key: format!("KEY{epoch}="),
            device: device.to_owned(),
            port,
            announced: true,
            preshared: epoch == 5,
        };
        RotationStatus {
            phase: "moving".to_owned(),
            keys: vec![key(5, "margay1", 51821), key(4, "margay0", 51820)],
            age_seconds: Some(7),
            rotation_epoch: 5,
            due_seconds: Some(86_400),
            completed: 2,
            waiting: vec![WaitingPeer {
                name: "beta".to_owned(),
                reason: "NoHandshake".to_owned(),
                message: "no handshake yet".to_owned(),
            }],
            blocked: None,
            settled: true,
        }
    }

    #[test]
    fn a_rotation_tells_its_keys_and_whom_it_waits_for() {
        let text = table(&moving());
        for line in [
            "Phase     moving",
            "Began     7s ago",
            "Next      in 1d00h",
            "5      margay1  51821  yes        yes        KEY5=",
            "4      margay0  51820  yes        no         KEY4=",
            "beta         NoHandshake  no handshake yet",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} is missing in\n{text}");
        }
    }

    #[test]
    fn what_is_in_the_way_is_said() {
        let blocked = Blocked { reason: "NoDevice".to_owned(), message: "margay1 is not there".to_owned() };
        let status = RotationStatus { blocked: Some(blocked.clone()), waiting: Vec::new(), ..moving() };
        assert!(table(&status).contains("Blocked   NoDevice: margay1 is not there"));
        let order = Ordered { epoch: 6, file: Some("/m/mesh.yaml".to_owned()), blocked: Some(blocked) };
        assert_eq!(
            ordered(&order),
            "/m/mesh.yaml asks all nodes for epoch 6, once this is over: margay1 is not there"
        );
        let order = Ordered { file: None, blocked: None, ..order };
        assert!(ordered(&order).starts_with("this node goes to epoch 6;"));
    }
}
