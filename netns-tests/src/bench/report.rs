//! Tables for people, and everything as JSON.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Value, json};

use crate::bench::Conditions;
use crate::bench::contestant::Contestant;
use crate::bench::goals::Goal;
use crate::bench::record::{BASE, Record};
use crate::bench::stats::percentile;
use crate::bench::tcp::Streams;

/// A table of medians: contestants down, metrics across.
struct Sheet<'a> {
    title: &'a str,
    /// Column heads and metrics.
    columns: Vec<(String, String)>,
    /// Digits behind the point.
    digits: usize,
    /// Whether ratios to [`BASE`] stand beside.
    ratios: bool,
}

/// All tables and the verdicts.
pub fn text(record: &Record, goals: &[Goal], conditions: &Conditions) -> String {
    let mut out = vec![head(conditions)];
    for sheet in sheets(conditions) {
        out.extend(sheet.render(record, &conditions.contestants));
    }
    out.extend(verdicts(goals));
    out.join("\n\n")
}

fn head(conditions: &Conditions) -> String {
    let mut table = table(&["contestant".into(), "version".into()]);
    for (contestant, version) in conditions.contestants.iter().zip(&conditions.versions) {
        table.add_row([contestant.name(), version]);
    }
    let busy: Vec<String> = conditions.busy.iter().map(|share| format!("{:.0} %", 100.0 * share)).collect();
    format!(
        "{}\n\n{}, {} CPUs; {} rounds, the contestants one after the other in each.\n\
         The machine was busy with other things before each round: {}.\n\
         Cells: median of the rounds (least–most){}.",
        lines(&table),
        conditions.kernel,
        conditions.cpus,
        conditions.rounds,
        busy.join(", "),
        match conditions.contestants.contains(&BASE) {
            true => ", then the median of each round's ratio to wireguard-go",
            false => "",
        }
    )
}

fn sheets(conditions: &Conditions) -> Vec<Sheet<'static>> {
    let tcp = |suffix: &str| -> Vec<(String, String)> {
        let arrow = |streams: Streams| if streams.reverse { "←" } else { "→" };
        let head =
            |s: Streams| format!("{} stream{} {}", s.count, if s.count > 1 { "s" } else { "" }, arrow(s));
        Streams::ALL.into_iter().map(|s| (head(s), format!("{}_{suffix}", s.id()))).collect()
    };
    let udp = |suffix: &str| -> Vec<(String, String)> {
        let offers = conditions.offers.iter();
        offers.map(|offer| (offer.replace('k', " kpps"), format!("udp_{offer}_{suffix}"))).collect()
    };
    let sheet = |title, columns, digits, ratios| Sheet { title, columns, digits, ratios };
    let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(head, metric)| ((*head).to_owned(), (*metric).to_owned())).collect()
    };
    vec![
        sheet("TCP, Mbit/s received", tcp("mbit_s"), 0, true),
        sheet("TCP, CPU-ms of both daemons per GB", tcp("daemon_cpu_ms_per_gb"), 0, true),
        sheet("TCP, CPU-ms of the whole machine per GB", tcp("machine_cpu_ms_per_gb"), 0, true),
        sheet(
            "UDP of 64 bytes, kpps that the generator sent, by the rate it was to offer",
            udp("sent_kpps"),
            1,
            false,
        ),
        sheet("UDP of 64 bytes, kpps received meanwhile", udp("received_kpps"), 1, false),
        sheet("UDP of 64 bytes, loss in % of what was sent", udp("loss_percent"), 2, false),
        sheet(
            "UDP of 64 bytes, CPU-µs of both daemons per packet received",
            udp("daemon_cpu_us_per_packet"),
            1,
            true,
        ),
        sheet(
            "UDP of 64 bytes, the most that arrived, and the least at higher rates than that one's",
            pairs(&[("peak, kpps", "udp_peak_kpps"), ("past it, of the peak", "udp_past_peak")]),
            2,
            false,
        ),
        sheet(
            "ping, µs",
            pairs(&[
                ("idle, average", "ping_idle_average_us"),
                ("idle, p99", "ping_idle_p99_us"),
                ("under a TCP stream, average", "ping_load_average_us"),
                ("under a TCP stream, p99", "ping_load_p99_us"),
            ]),
            0,
            true,
        ),
        sheet(
            "CPU-ms of both daemons per GB, by configured peers; KiB for each of 1,000; seconds to 1,000 cold sessions",
            pairs(&[
                ("1 peer", "peers_1_daemon_cpu_ms_per_gb"),
                ("1,000", "peers_1000_daemon_cpu_ms_per_gb"),
                ("KiB each", "peers_memory_kib_each"),
                ("s, begun by us", "peers_1000_handshakes_begun_s"),
                ("s, begun by them", "peers_1000_handshakes_answered_s"),
            ]),
            1,
            false,
        ),
        sheet(
            "Look-up of an allowed IP, ns, by prefixes",
            pairs(&[
                ("1", "allowed_ips_1_lookup_ns"),
                ("1,000", "allowed_ips_1000_lookup_ns"),
                ("10,000", "allowed_ips_10000_lookup_ns"),
            ]),
            1,
            false,
        ),
    ]
}

impl Sheet<'_> {
    /// `None` if nothing of it was measured.
    fn render(&self, record: &Record, contestants: &[Contestant]) -> Option<String> {
        let heads = self.columns.iter().map(|(head, _)| head.clone());
        let mut table = table(&std::iter::once(String::new()).chain(heads).collect::<Vec<_>>());
        let mut any = false;
        for contestant in contestants {
            let cells: Vec<String> =
                self.columns.iter().map(|(_, metric)| self.cell(record, metric, *contestant)).collect();
            if cells.iter().any(|cell| cell != "-") {
                any = true;
                table.add_row(std::iter::once(contestant.name().to_owned()).chain(cells));
            }
        }
        any.then(|| format!("{}\n{}", self.title, lines(&table)))
    }

    fn cell(&self, record: &Record, metric: &str, contestant: Contestant) -> String {
        let Some(summary) = record.summary(metric, contestant) else { return "-".into() };
        let digits = self.digits;
        let mut cell =
            format!("{:.digits$} ({:.digits$}–{:.digits$})", summary.median, summary.min, summary.max);
        if self.ratios
            && contestant != BASE
            && let Some(ratio) = record.ratio(metric, contestant)
        {
            cell.push_str(&format!(" {:.2}×", ratio.median));
        }
        cell
    }
}

fn verdicts(goals: &[Goal]) -> Option<String> {
    if goals.is_empty() {
        return None;
    }
    let heads = ["margay", "goal", "got", "spread", "", "verdict"].map(str::to_owned);
    let mut table = table(&heads);
    for goal in goals {
        let bound = if goal.at_least { "≥" } else { "≤" };
        let spread = goal.spread.map_or("-".into(), |s| format!("{:.2}–{:.2}", s.min, s.max));
        let verdict = match goal.is_met() {
            true => "met".into(),
            false => format!("short by {:.0} %", goal.short_percent()),
        };
        table.add_row([
            goal.what.clone(),
            format!("{bound} {}", goal.goal),
            format!("{:.2}", goal.got),
            spread,
            goal.unit.to_owned(),
            verdict,
        ]);
    }
    let met = goals.iter().filter(|goal| goal.is_met()).count();
    Some(format!("Goals: {met} of {} met\n{}", goals.len(), lines(&table)))
}

/// Everything, for programs.
pub fn json(record: &Record, goals: &[Goal], conditions: &Conditions) -> Value {
    let mut metrics = serde_json::Map::new();
    for metric in record.metrics() {
        let mut of = serde_json::Map::new();
        for contestant in &conditions.contestants {
            let Some(summary) = record.summary(metric, *contestant) else { continue };
            let samples = record.samples(metric, *contestant);
            let mut entry = json!({
                "rounds": record.rounds(metric, *contestant),
                "median": summary.median,
                "min": summary.min,
                "max": summary.max,
                "ratioToWireguardGo": record.ratio(metric, *contestant),
            });
            if let (false, Some(entry)) = (samples.is_empty(), entry.as_object_mut()) {
                entry.insert("samples".into(), json!(samples.len()));
                entry.insert("p99OfAllSamples".into(), json!(percentile(samples, 0.99)));
            }
            of.insert(contestant.name().into(), entry);
        }
        metrics.insert(metric.into(), json!({ "unit": record.unit(metric), "contestants": of }));
    }
    let goals: Vec<Value> = goals
        .iter()
        .map(|goal| {
            let mut value = json!(goal);
            if let Some(value) = value.as_object_mut() {
                value.insert("met".into(), json!(goal.is_met()));
            }
            value
        })
        .collect();
    json!({ "conditions": conditions, "metrics": metrics, "goals": goals })
}

fn table(header: &[String]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index > 0 {
            column.set_cell_alignment(CellAlignment::Left);
        }
    }
    table
}

fn lines(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}
