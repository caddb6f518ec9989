-- A Wireshark dissector for the inter-core interrupts of an AMP board, installed by `inco-trio dissector --install`.
-- A frame with EtherType 0x8800 contains the name of a signal. In recordings of inco-trio, frames with EtherType 0x88B5
-- and zero addresses contain marks and notifications without a frame.

local inco = Proto("inco", "Inter-core interrupt")

local signal = ProtoField.string("inco.signal", "Signal")
local direction = ProtoField.string("inco.direction", "Direction", "As core 0 sees it")
local register = ProtoField.string("inco.register", "Register", "The file of the signal on core 0")
local pending = ProtoField.string("inco.pending", "Pending", "Why it could not be delivered or sent at this time")
local delay = ProtoField.double("inco.delay", "Delay", "How long it had been pending, in seconds")
local delay_max = ProtoField.double("inco.delay_max", "Maximum delay", "The longest possible delay, in seconds")
local count = ProtoField.uint32("inco.count", "Count", base.DEC, nil, nil, "How many notifications the packet stands for")
local mark = ProtoField.string("inco.mark", "Mark", "An event that is not a notification")
local padding = ProtoField.bytes("inco.padding", "Padding")
inco.fields = { signal, direction, register, pending, delay, delay_max, count, mark, padding }

local malformed = ProtoExpert.new("inco.malformed", "No wire name", expert.group.MALFORMED, expert.severity.WARN)
local incomplete =
    ProtoExpert.new("inco.incomplete", "Truncated capture", expert.group.UNDECODED, expert.severity.NOTE)
inco.experts = { malformed, incomplete }

local flags = Field.new("frame.packet_flags_direction")
local comments = Field.new("frame.comment")
local addresses = { Field.new("eth.dst"), Field.new("eth.src") }

local NAME_MAX = 64
-- The proxy ignores longer frames. The limit also avoids scanning up to 200 kB of padding.
local FRAME_MAX = 1600
local COUNT_MAX = 1048576
local WAYS = { [1] = "inbound", [2] = "outbound" }
local ARROWS = { inbound = "core 1 > core 0  ", outbound = "core 0 > core 1  " }
local ZEROS = "000000000000"

local function show(pinfo, way, text)
    pinfo.cols.protocol = "inco"
    pinfo.cols.info = (ARROWS[way] or "") .. text
end

local function is_wire_name(name)
    return #name <= NAME_MAX and name:match("^[!-~]+$") ~= nil
end

local function complain(tree, pinfo, fault, text)
    tree:add_proto_expert_info(fault)
    show(pinfo, nil, text)
end

-- Return the direction from a frame's flags, and the register from its comment.
local function recorded(name)
    local flag, comment = flags(), comments()
    local way = flag and WAYS[flag.value]
    if way and comment then
        local prefix = way .. " " .. name .. " "
        if comment.value:sub(1, #prefix) == prefix then
            return way, comment.value:sub(#prefix + 1)
        end
    end
    return way, nil
end

-- Add what a recording contains beside the signal. Return the same as text for the column Info.
local function add_recorded(tree, way, file, reason, seconds, longest, number)
    local texts = {}
    if way then
        tree:add(direction, way):set_generated()
    end
    if file and file ~= "" then
        tree:add(register, file):set_generated()
    end
    if number and number > 1 and number <= COUNT_MAX and number % 1 == 0 then
        tree:add(count, number):set_generated()
        texts[#texts + 1] = number .. " times"
    end
    if reason then
        tree:add(pending, reason):set_generated()
        texts[#texts + 1] = "pending: " .. reason
    elseif seconds then
        tree:add(delay, seconds):set_generated()
        texts[#texts + 1] = string.format("was pending for %.6f s", seconds)
    elseif longest then
        tree:add(delay_max, longest):set_generated()
        texts[#texts + 1] = string.format("was pending for up to %.6f s", longest)
    end
    return texts
end

local function in_brackets(texts)
    return #texts > 0 and " (" .. table.concat(texts, ", ") .. ")" or ""
end

function inco.dissector(buffer, pinfo, root)
    local length = buffer:len()
    local tree = root:add(inco, buffer())
    -- Never return 0 for an empty frame: Wireshark would try other dissectors.
    if length < buffer:reported_len() then
        complain(tree, pinfo, incomplete, "truncated capture")
        return math.max(length, 1)
    elseif pinfo.len > FRAME_MAX then
        complain(tree, pinfo, malformed, "malformed")
        return length
    end
    local used = length
    while used > 0 and buffer(used - 1, 1):uint() == 0 do
        used = used - 1
    end
    local name = used > 0 and used <= NAME_MAX and buffer:raw(0, used) or ""
    if not is_wire_name(name) then
        complain(tree, pinfo, malformed, "malformed")
        return math.max(length, 1)
    end
    local way, file = recorded(name)
    tree:add(signal, buffer(0, used))
    -- The comment of a notification that was pending ends with the reason, or with the delay.
    local rest = file or ""
    local reason, seconds, longest
    if rest:sub(-1) == "]" then -- Otherwise, each search would take quadratic time.
        reason, seconds = rest:match("%[pending: (.+)%]$"), rest:match("%[after ([%d.]+) s%]$")
        longest = rest:match("%[after up to ([%d.]+) s%]$")
        file = rest:gsub(" ?%[pending: .+%]$", ""):gsub(" ?%[after [%d.]+ s%]$", "")
        file = file:gsub(" ?%[after up to [%d.]+ s%]$", "")
    end
    local texts = add_recorded(tree, way, file, reason, tonumber(seconds), tonumber(longest))
    if used < length then
        tree:add(padding, buffer(used))
    end
    tree:append_text(": " .. name)
    show(pinfo, way, name .. in_brackets(texts))
    return length
end

local function utf8(code)
    if code < 0x80 then
        return string.char(code)
    elseif code < 0x800 then
        return string.char(0xC0 + math.floor(code / 0x40), 0x80 + code % 0x40)
    elseif code < 0x10000 then
        return string.char(0xE0 + math.floor(code / 0x1000), 0x80 + math.floor(code / 0x40) % 0x40, 0x80 + code % 0x40)
    end
    return string.char(
        0xF0 + math.floor(code / 0x40000), 0x80 + math.floor(code / 0x1000) % 0x40,
        0x80 + math.floor(code / 0x40) % 0x40, 0x80 + code % 0x40
    )
end

-- Return the number of `key` in a flat JSON object, or nil if it has no such key.
local function number_of(json, key)
    return tonumber(json:match('[{ ]"' .. key .. '": ([%d.e+-]+)[,}]'))
end

local ESCAPES = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

-- Return the value of `key` in a flat JSON object of strings, or nil if it has no such key.
local function string_of(json, key)
    local _, start = json:find('"' .. key .. '": "', 1, true)
    if not start then
        return nil
    end
    local parts, at, high = {}, start + 1, nil
    while at <= #json do
        local char = json:sub(at, at)
        if char == '"' then
            return table.concat(parts)
        elseif char == "\\" then
            local escape, code = json:sub(at + 1, at + 1), json:match("^u(%x%x%x%x)", at + 1)
            if code then
                local number = tonumber(code, 16)
                if number >= 0xD800 and number < 0xDC00 then
                    high = number
                else
                    if number >= 0xDC00 and number < 0xE000 then
                        number = 0x10000 + ((high or 0xD800) - 0xD800) * 0x400 + number - 0xDC00
                    end
                    parts[#parts + 1] = utf8(number)
                end
                at = at + 6
            else
                parts[#parts + 1] = ESCAPES[escape] or escape
                at = at + 2
            end
        else
            parts[#parts + 1] = char
            at = at + 1
        end
    end
    return nil
end

-- Return whether both MAC addresses are zero, as in packets that a recording adds.
local function has_zero_addresses()
    for _, field in ipairs(addresses) do
        local address = field()
        if not address or address.range:bytes():tohex() ~= ZEROS then
            return false
        end
    end
    return true
end

local beside = Proto("inco_beside", "Inter-core interrupt without a frame")

function beside.dissector(buffer, pinfo, root)
    local json = buffer:raw()
    local name, happened = string_of(json, "signal"), string_of(json, "mark")
    if not has_zero_addresses() or not (name or happened) then
        return Dissector.get("data"):call(buffer, pinfo, root)
    end
    local tree = root:add(inco, buffer())
    if name and not is_wire_name(name) then
        complain(tree, pinfo, malformed, "malformed")
    elseif name then
        local way = string_of(json, "direction")
        way = ARROWS[way] and way
        tree:add(signal, name):set_generated()
        local file, reason = string_of(json, "register"), string_of(json, "pending")
        local seconds, longest = number_of(json, "delay"), number_of(json, "delay_max")
        local texts = add_recorded(tree, way, file, reason, seconds, longest, number_of(json, "count"))
        texts[#texts + 1] = "without a frame"
        show(pinfo, way, name .. in_brackets(texts))
    else
        tree:add(mark, happened):set_generated()
        show(pinfo, nil, happened)
    end
    return buffer:len()
end

local types = DissectorTable.get("ethertype")
types:add(0x8800, inco)
types:add(0x88B5, beside)
