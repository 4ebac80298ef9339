//! `meshctl status`: the whole node on a page.

use mesh_api::status::{DeviceStatus, PeerState, Status};

use super::{age, or_dash, peers, table as new_table, text};

pub(crate) fn table(status: &Status) -> String {
    [
        head(status),
        devices(status),
        offloads(&status.devices),
        peers_section(status),
        reconcilers(status),
        endpoints(status),
        issues(status),
    ]
    .into_iter()
    .filter(|section| !section.is_empty())
    .collect::<Vec<_>>()
    .join("\n\n")
}

fn head(status: &Status) -> String {
    let count = |state: PeerState| status.peers.iter().filter(|peer| peer.state == state).count();
    let mut counts: Vec<String> = [PeerState::Up, PeerState::Idle, PeerState::Down, PeerState::Unknown]
        .into_iter()
        .filter(|state| *state != PeerState::Unknown || count(*state) > 0)
        .map(|state| format!("{} {}", count(state), peers::state(state)))
        .collect();
    counts.insert(0, format!("{} peers", status.peers.len()));
    let generation = status.generation;
    let enforced = if generation.enforced >= generation.snapshot {
        format!("generation {} enforced", generation.enforced)
    } else {
        format!("generation {} of {} enforced", generation.enforced, generation.snapshot)
    };
    let waiting: Vec<&str> =
        status.sources.iter().filter(|source| !source.synced).map(|source| source.name.as_str()).collect();
    let sources = if waiting.is_empty() {
        format!("{} synced", status.sources.len())
    } else {
        format!("waiting for {}", waiting.join(", "))
    };
    let rotation = &status.rotation;
    // Steady is as it should be.
    let keys = match rotation.keys.first() {
        Some(key) if rotation.phase != "steady" => {
            format!("\nKeys      {} to epoch {}, `meshctl keys` says more", rotation.phase, key.epoch)
        }
        _ => String::new(),
    };
    // That the API server sees to it is as it should be.
    let trust = match status.announcement_trust.as_str() {
        "" | "admission" => String::new(),
        other => format!("\nTrust     {other}"),
    };
    format!(
        "Node      {}\nAgent     {}, up {}\nMesh      {}\nState     {enforced}\nSources   {sources}{keys}{trust}",
        status.node,
        status.version,
        age(status.uptime_seconds),
        counts.join(", "),
    )
}

fn devices(status: &Status) -> String {
    let mut out = new_table(&["DEVICE", "KIND", "STATE", "PORT", "MTU", "PUBLIC KEY"]);
    for device in &status.devices {
        out.add_row(vec![
            device.name.clone(),
            device.kind.clone(),
            device.state.clone(),
            device.listen_port.to_string(),
            device.mtu.to_string(),
            or_dash(device.public_key.clone()),
        ]);
    }
    if status.devices.is_empty() { String::new() } else { text(&out) }
}

/// What the devices are made of, and which offloads they have or why not.
pub(crate) fn offloads(devices: &[DeviceStatus]) -> String {
    let counted: Vec<_> = devices.iter().filter(|device| !device.version.is_empty()).collect();
    if counted.is_empty() {
        return String::new();
    }
    let mut out = new_table(&["DATAPATH", "VERSION", "CORE", "CRYPTO", "OFFLOADS"]);
    for device in counted {
        out.add_row(vec![
            device.name.clone(),
            device.version.clone(),
            device.core.clone(),
            device.crypto.clone(),
            device
                .offloads
                .iter()
                .map(|(name, state)| format!("{name} {state}"))
                .collect::<Vec<_>>()
                .join(", "),
        ]);
    }
    text(&out)
}

fn peers_section(status: &Status) -> String {
    if status.peers.is_empty() { String::new() } else { peers::table(&status.peers, false) }
}

/// Only those not done: a healthy page stays short.
fn reconcilers(status: &Status) -> String {
    let unfinished: Vec<_> = status.reconcilers.iter().filter(|r| r.state != "done").collect();
    if unfinished.is_empty() {
        return String::new();
    }
    let mut out = new_table(&["RECONCILER", "STATE", "GENERATION", "ERROR"]);
    for reconciler in unfinished {
        out.add_row(vec![
            reconciler.name.clone(),
            reconciler.state.clone(),
            reconciler.generation.to_string(),
            or_dash(reconciler.error.clone()),
        ]);
    }
    text(&out)
}

fn endpoints(status: &Status) -> String {
    if status.endpoints.is_empty() {
        return String::new();
    }
    let mut out = new_table(&["POD", "INTERFACE", "ADDRESSES", "POLICY"]);
    for endpoint in &status.endpoints {
        let addresses: Vec<String> = endpoint.addresses.iter().map(ToString::to_string).collect();
        out.add_row(vec![
            endpoint.pod.clone(),
            endpoint.interface.clone(),
            addresses.join(","),
            endpoint.policy.clone(),
        ]);
    }
    text(&out)
}

fn issues(status: &Status) -> String {
    if status.issues.is_empty() {
        return "No issues".to_owned();
    }
    let mut out = new_table(&["ISSUE", "OBJECT", "FIELD", "MESSAGE"]);
    for issue in &status.issues {
        let field = if issue.field.is_empty() { "-" } else { &issue.field };
        out.add_row(vec![&issue.reason, &issue.object, field, &issue.message]);
    }
    text(&out)
}

#[cfg(test)]
mod tests {
    use mesh_api::status::{
        DeviceStatus, EndpointStatus, Generation, Issue, PeerState, ReconcilerStatus, SourceStatus,
    };

    use super::*;
    use crate::render::peers::tests::peer;

    fn status() -> Status {
        Status {
            node: "alpha".to_owned(),
            version: "0.1.0".to_owned(),
            uptime_seconds: 61,
            generation: Generation { snapshot: 9, enforced: 9, policy: 9 },
            devices: vec![DeviceStatus {
                name: "margay0".to_owned(),
                kind: "userspace".to_owned(),
                state: "up".to_owned(),
                public_key: Some("KEY=".to_owned()),
                listen_port: 51820,
                mtu: 1420,
                version: "0.1.0".to_owned(),
                core: "mesh-noise".to_owned(),
                crypto: "ring".to_owned(),
                offloads: [("tun_tso".to_owned(), "on".to_owned()), ("udp_gso".to_owned(), "off".to_owned())]
                    .into(),
                drops: Default::default(),
            }],
            peers: vec![peer("b", PeerState::Up, Some(5)), peer("c", PeerState::Idle, None)],
            sources: vec![SourceStatus { name: "directory".to_owned(), synced: true, objects: 4 }],
            reconcilers: vec![ReconcilerStatus {
                name: "routes".to_owned(),
                state: "done".to_owned(),
                generation: 9,
                operations: 3,
                error: None,
            }],
            endpoints: vec![EndpointStatus {
                pod: "x/a".to_owned(),
                interface: "mgy0123456789".to_owned(),
                addresses: vec!["10.244.1.2".parse().unwrap()],
                policy: "open".to_owned(),
            }],
            issues: Vec::new(),
            rotation: Default::default(),
            announcement_trust: "admission".to_owned(),
        }
    }

    #[test]
    fn a_healthy_node_reads_top_down() {
        let text = table(&status());
        for line in [
            "Mesh      2 peers, 1 up, 1 idle, 0 down",
            "State     generation 9 enforced",
            "Sources   1 synced",
            "margay0  userspace  up     51820  1420  KEY=",
            "margay0   0.1.0    mesh-noise  ring    tun_tso on, udp_gso off",
            "x/a  mgy0123456789  10.244.1.2  open",
            "No issues",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} is missing in\n{text}");
        }
        assert!(!text.contains("RECONCILER"), "{text}");
    }

    #[test]
    fn trouble_is_shown_with_its_object_and_field() {
        let mut status = status();
        status.generation.snapshot = 10;
        status.reconcilers[0].state = "error".to_owned();
        status.reconcilers[0].error = Some("route 10.0.0.0/8: EPERM".to_owned());
        status.sources[0].synced = false;
        status.issues.push(Issue {
            object: "Node/b".to_owned(),
            field: "spec.podCIDRs".to_owned(),
            reason: "OverlappingPrefix".to_owned(),
            message: "10.244.1.0/24 is alpha's".to_owned(),
        });
        let text = table(&status);
        for word in [
            "generation 9 of 10 enforced",
            "waiting for directory",
            "route 10.0.0.0/8: EPERM",
            "OverlappingPrefix",
            "spec.podCIDRs",
        ] {
            assert!(text.contains(word), "{word:?} is missing in\n{text}");
        }
    }
}
