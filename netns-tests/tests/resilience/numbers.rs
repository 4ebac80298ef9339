//! Every number that docs/datapath.md lists is told by `meshctl` and by the metrics.

use std::collections::BTreeSet;

use netns_tests::lab::PATIENCE;
use netns_tests::wait;

use crate::common::{all_between, assert_reach};
use crate::support::{metric, metrics, watched};

const DOCUMENTED: &str = include_str!("../../../docs/datapath.md");

/// What stands in back quotes in the first column of the table that begins with `header`.
fn first_column(header: &str) -> BTreeSet<&'static str> {
    let table = DOCUMENTED.split(header).nth(1).unwrap().lines().skip(1);
    let rows = table.take_while(|line| line.starts_with('|')).filter(|line| !line.starts_with("| ---"));
    let cells = rows.map(|row| row.split('|').nth(1).unwrap());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn every_documented_reason_and_offload_is_in_meshctl_and_in_the_metrics() {
    let reasons = first_column("| reason | what was dropped |");
    assert!(reasons.len() >= 24, "{reasons:?}");
    let (lab, _capture) = watched("ab", "");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let host = lab.host("a").unwrap();
    wait::until("every number", PATIENCE, || {
        let told = host.run(&["meshctl", "peers", "-v"])?;
        let rows: Vec<Vec<&str>> = told.lines().map(|line| line.split_whitespace().collect()).collect();
        let of_device: BTreeSet<&str> =
            rows.iter().filter(|row| row.len() == 3 && row[0] == "margay0").map(|row| row[1]).collect();
        anyhow::ensure!(reasons.is_subset(&of_device), "{reasons:?}\n{told}");
        let metrics = metrics(&lab, "a");
        let counted: BTreeSet<&str> = metrics
            .keys()
            .filter(|sample| sample.starts_with("margay_datapath_drops_total{"))
            .filter_map(|sample| sample.split("reason=\"").nth(1)?.split('"').next())
            .collect();
        anyhow::ensure!(counted == reasons, "{counted:?}\n{reasons:?}");
        for offload in ["tun_tso", "tun_uso", "udp_gso", "udp_gro"] {
            assert!(DOCUMENTED.contains(&format!("`{offload}`")));
            // This kernel has all of them.
            anyhow::ensure!(told.contains(&format!("{offload} on")), "{offload}\n{told}");
            let labels = [("iface", "margay0"), ("offload", offload), ("state", "on")];
            anyhow::ensure!(metric(&metrics, "margay_datapath_offload", &labels) == Some(1.0), "{offload}");
        }
        // Of a peer: what docs/observability.md lists, beside bytes and the handshake's age.
        let labels = [("iface", "margay0"), ("peer", "b")];
        for name in ["packets_sent", "packets_rcvd", "handshakes", "initiations", "heals"] {
            let name = format!("margay_peer_{name}_total");
            anyhow::ensure!(metric(&metrics, &name, &labels).is_some(), "{name}");
        }
        let calico = [("iface", "margay0"), ("peer_endpoint", "192.0.2.2:51820")];
        for name in ["wireguard_bytes_sent", "wireguard_bytes_rcvd", "wireguard_latest_handshake_seconds"] {
            anyhow::ensure!(metric(&metrics, name, &calico).is_some_and(|value| value > 0.0), "{name}");
        }
        Ok(Some(()))
    })
    .unwrap();
}
