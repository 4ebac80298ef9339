//! What was found, for people.

use comfy_table::{ContentArrangement, Table, presets};

use super::{Outcome, Size};

/// One line: what, how much, and the goal where there is one.
struct Row(&'static str, String, Option<(&'static str, bool)>);

/// The table, with a goal met or missed beside each figure that has one.
pub fn text(size: Size, found: &Outcome) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["mesh-agent", "found", "goal"]);
    for Row(what, value, goal) in rows(size, found) {
        let goal = goal.map(|(text, met)| format!("{text}: {}", if met { "met" } else { "MISSED" }));
        table.add_row([what.to_owned(), value, goal.unwrap_or_default()]);
    }
    format!(
        "One real agent among {} nodes with {} pods ({} simulated agents, {} of which follow pods)\n{table}",
        size.nodes + 1,
        size.nodes as usize * size.pods_each + size.own_pods,
        size.agents,
        size.with_pods.min(size.agents),
    )
}

fn rows(size: Size, found: &Outcome) -> Vec<Row> {
    let (median, p99, longest) = found.change_ms;
    let (restart_s, mean, peak) = found.restart;
    vec![
        Row("making the cluster", format!("{:.0} s", found.setup_s.0), None),
        Row("all others converged", format!("{:.0} s", found.setup_s.1), None),
        Row(
            "converged after its start",
            format!("{:.1} s", found.converged_s),
            Some(("10 s", found.converged_s <= 10.0)),
        ),
        Row("CPU for that", format!("{:.1} s", found.converged_cpu_s), None),
        Row(
            "memory at most until then",
            format!("{:.0} MiB", found.rss_mib.0),
            Some(("100 MiB", found.rss_mib.0 <= 100.0)),
        ),
        Row(
            "memory afterwards",
            format!("{:.0} MiB", found.rss_mib.1),
            Some(("100 MiB", found.rss_mib.1 <= 100.0)),
        ),
        Row("mesh-datapath's memory, both devices", format!("{:.0} MiB", found.datapath_rss_mib), None),
        Row("a node's change live: median", format!("{median:.0} ms"), None),
        Row("99 of 100", format!("{p99:.0} ms"), Some(("1,000 ms", p99 < 1000.0))),
        Row("longest", format!("{longest:.0} ms"), None),
        Row("CPU for each change", format!("{:.0} ms", found.change_cpu_s * 1000.0), None),
        Row(
            "at rest, of a core",
            format!("{:.2} % over {} s", found.rest_core * 100.0, size.rest_s),
            Some(("1 %", found.rest_core < 0.01)),
        ),
        Row(
            "lists at rest, all agents",
            format!("{}", found.rest_lists),
            Some(("none", found.rest_lists == 0)),
        ),
        Row(
            "writes at rest, per node and 5 minutes",
            format!("{:.2}", found.rest_writes),
            Some(("1", found.rest_writes <= 1.0)),
        ),
        Row("restart of all agents", format!("{restart_s:.0} s, {} at a time", size.batch), None),
        Row("requests a second then", format!("{mean:.0}, at most {peak:.0}"), None),
    ]
}
