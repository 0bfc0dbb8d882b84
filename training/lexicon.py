"""The words of the small world: names, animals, things, places and the parts of phrase pairs.

Every entry carries both languages, so that English and Chinese text speak about one world. All names, phone
numbers and e-mail addresses that the generator makes from these lists are invented.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of story character: English noun, Chinese noun, Chinese measure word, grammatical gender."""

    en: str
    zh: str
    measure: str
    gender: str


class Thing(NamedTuple):
    """A thing that can be lost or found: English noun, Chinese noun, Chinese measure word."""

    en: str
    zh: str
    measure: str


KINDS = [
    Kind("little fox", "小狐狸", "只", "m"),
    Kind("little rabbit", "小兔子", "只", "f"),
    Kind("little bear", "小熊", "只", "m"),
    Kind("little mouse", "小老鼠", "只", "f"),
    Kind("little cat", "小猫", "只", "f"),
    Kind("little dog", "小狗", "只", "m"),
    Kind("little bird", "小鸟", "只", "f"),
    Kind("little frog", "小青蛙", "只", "m"),
    Kind("little duck", "小鸭子", "只", "f"),
    Kind("little squirrel", "小松鼠", "只", "f"),
    Kind("little hedgehog", "小刺猬", "只", "m"),
    Kind("little turtle", "小乌龟", "只", "m"),
    Kind("little deer", "小鹿", "只", "f"),
    Kind("little monkey", "小猴子", "只", "m"),
    Kind("girl", "小女孩", "个", "f"),
    Kind("boy", "小男孩", "个", "m"),
]

NAMES_EN = {
    "f": [
        "Mia",
        "Lily",
        "Anna",
        "Rosa",
        "Nina",
        "Ella",
        "Lucy",
        "Clara",
        "Emma",
        "Ruby",
        "Ivy",
        "Daisy",
        "Zoe",
    ],
    "m": ["Tom", "Pip", "Max", "Leo", "Ben", "Sam", "Otto", "Felix", "Finn", "Hugo", "Oscar", "Jack", "Theo"],
}
NAMES_ZH = {
    "f": ["丽丽", "小红", "小美", "花花", "朵朵", "圆圆", "小雨", "月月", "小兰", "甜甜", "小雪", "安安"],
    "m": ["小明", "阿宝", "乐乐", "豆豆", "小刚", "天天", "小亮", "冬冬", "阿福", "小龙", "石头", "强强"],
}
FAMILY_EN = [
    "Baker",
    "Miller",
    "Green",
    "Hill",
    "Wood",
    "Stone",
    "Brook",
    "Field",
    "Parker",
    "Fisher",
    "Lake",
    "Marsh",
]
FAMILY_ZH = ["王", "李", "张", "刘", "陈", "杨", "赵", "黄", "周", "吴", "林", "何"]
GIVEN_ZH = [
    "伟",
    "芳",
    "娜",
    "敏",
    "静",
    "强",
    "磊",
    "洋",
    "艳",
    "勇",
    "杰",
    "娟",
    "涛",
    "明华",
    "建国",
    "晓东",
    "雨晴",
]

# Names and nouns that nobody has: what has to be copied from the request, for no table of names knows it.
_SYLLABLES = """
ba bel bra cor dan del dor el fal fen gar gil hal hem jo kan kel lam lin lor mar mel mi nel no or pal per pol
ran rel ro sal sen sil tam ten tor ul van vel wil win yor zan
"""
_CHARACTERS = "丽华国平秀英红军志文海波春燕小玉梅兰云山川宇浩思佳欣怡子涵梓轩天乐安宁新木石田马方高白江宋孙"


def made_up(rng: random.Random, chinese: bool) -> str:
    """A word of two or three syllables, or of two characters."""
    if chinese:
        return "".join(rng.sample(_CHARACTERS, 2))
    return "".join(rng.sample(_SYLLABLES.split(), rng.choice([2, 2, 3])))


TRAITS = [
    ("brave", "勇敢的"),
    ("curious", "好奇的"),
    ("kind", "善良的"),
    ("shy", "害羞的"),
    ("clever", "聪明的"),
    ("cheerful", "快乐的"),
    ("quiet", "安静的"),
    ("gentle", "温柔的"),
    ("busy", "忙碌的"),
    ("patient", "有耐心的"),
]

THINGS = [
    Thing("kite", "风筝", "只"),
    Thing("ball", "球", "个"),
    Thing("hat", "帽子", "顶"),
    Thing("key", "钥匙", "把"),
    Thing("book", "书", "本"),
    Thing("bell", "铃铛", "个"),
    Thing("lantern", "灯笼", "盏"),
    Thing("scarf", "围巾", "条"),
    Thing("drum", "鼓", "面"),
    Thing("basket", "篮子", "个"),
    Thing("cup", "杯子", "个"),
    Thing("whistle", "哨子", "个"),
    Thing("map", "地图", "张"),
    Thing("blanket", "毯子", "条"),
]

# What people write of in messages, beside the things of the stories.
BELONGINGS = [
    ("umbrella", "雨伞"),
    ("wallet", "钱包"),
    ("phone", "手机"),
    ("coat", "外套"),
    ("bag", "包"),
    ("watch", "手表"),
    ("ring", "戒指"),
    ("camera", "照相机"),
    ("glove", "手套"),
    ("bicycle", "自行车"),
    ("letter", "信"),
    ("parcel", "包裹"),
    ("ticket", "票"),
    ("passport", "护照"),
    ("computer", "电脑"),
    ("pen", "钢笔"),
    ("notebook", "笔记本"),
    ("suitcase", "行李箱"),
    ("jacket", "夹克"),
    ("sweater", "毛衣"),
    ("necklace", "项链"),
    ("lamp", "台灯"),
    ("chair", "椅子"),
    ("table", "桌子"),
    ("picture", "画"),
    ("guitar", "吉他"),
    ("bottle", "瓶子"),
    ("box", "盒子"),
    ("helmet", "头盔"),
    ("shoe", "鞋子"),
    ("flower", "花"),
    ("cake", "蛋糕"),
    ("radio", "收音机"),
    ("clock", "钟"),
    ("mirror", "镜子"),
    ("doll", "娃娃"),
    ("pillow", "枕头"),
    ("towel", "毛巾"),
    ("knife", "刀"),
    ("spoon", "勺子"),
    ("plate", "盘子"),
    ("pot", "锅"),
    ("brush", "刷子"),
    ("hammer", "锤子"),
    ("ladder", "梯子"),
    ("rope", "绳子"),
    ("tent", "帐篷"),
    ("boat", "船"),
    ("cart", "小车"),
    ("card", "卡片"),
    ("coin", "硬币"),
    ("candle", "蜡烛"),
    ("pencil", "铅笔"),
    ("calendar", "日历"),
    ("keyboard", "键盘"),
    ("printer", "打印机"),
    ("telephone", "电话机"),
    ("backpack", "背包"),
    ("purse", "手提包"),
    ("belt", "腰带"),
]

COLOURS = [
    ("red", "红色的"),
    ("blue", "蓝色的"),
    ("green", "绿色的"),
    ("yellow", "黄色的"),
    ("white", "白色的"),
    ("purple", "紫色的"),
    ("orange", "橙色的"),
    ("golden", "金色的"),
]

HOMES = [
    ("the forest", "in the forest", "森林里"),
    ("the village", "in the village", "村子里"),
    ("the lake", "by the lake", "湖边"),
    ("the hill", "on the hill", "山坡上"),
    ("the river", "by the river", "河边"),
    ("the valley", "in the green valley", "山谷里"),
    ("the sea", "by the sea", "海边"),
    ("the meadow", "in the meadow", "草原上"),
]

PLACES = [
    ("the old bridge", "老桥边"),
    ("the garden", "花园里"),
    ("the market", "集市上"),
    ("the mill", "磨坊旁"),
    ("the well", "井边"),
    ("the big oak tree", "大橡树下"),
    ("the school", "学校里"),
    ("the pond", "池塘边"),
    ("the farm", "农场里"),
    ("the cave", "山洞口"),
    ("the tower", "高塔下"),
    ("the orchard", "果园里"),
    ("the station", "车站旁"),
    ("the library", "图书馆里"),
]

FOODS = [
    ("bread and honey", "蜂蜜面包"),
    ("apple cake", "苹果蛋糕"),
    ("warm soup", "热汤"),
    ("pancakes", "煎饼"),
    ("berries", "莓果"),
    ("dumplings", "饺子"),
    ("cheese", "奶酪"),
    ("noodles", "面条"),
]

COUNTABLES = [
    ("apple", "apples", "苹果", "个"),
    ("book", "books", "书", "本"),
    ("egg", "eggs", "鸡蛋", "个"),
    ("flower", "flowers", "花", "朵"),
    ("stone", "stones", "石头", "块"),
    ("coin", "coins", "硬币", "枚"),
    ("pencil", "pencils", "铅笔", "支"),
    ("cake", "cakes", "蛋糕", "块"),
    ("shell", "shells", "贝壳", "个"),
    ("fish", "fish", "鱼", "条"),
    ("candle", "candles", "蜡烛", "支"),
    ("nut", "nuts", "坚果", "颗"),
]

# Facts about animals: English name, Chinese name, food, home, sound, number of legs.
ANIMALS = [
    ("cow", "牛", ("grass", "草"), ("on a farm", "农场里"), ("moo", "哞哞"), 4),
    ("cat", "猫", ("fish and mice", "鱼和老鼠"), ("in a house", "房子里"), ("meow", "喵喵"), 4),
    ("dog", "狗", ("meat and bones", "肉和骨头"), ("in a house", "房子里"), ("woof", "汪汪"), 4),
    ("horse", "马", ("grass and hay", "草和干草"), ("in a stable", "马厩里"), ("neigh", "咴咴"), 4),
    ("duck", "鸭子", ("plants and snails", "水草和蜗牛"), ("on a pond", "池塘里"), ("quack", "嘎嘎"), 2),
    ("sheep", "羊", ("grass", "草"), ("in a meadow", "草原上"), ("baa", "咩咩"), 4),
    ("frog", "青蛙", ("flies", "苍蝇"), ("by a pond", "池塘边"), ("ribbit", "呱呱"), 4),
    ("owl", "猫头鹰", ("mice", "老鼠"), ("in a hollow tree", "树洞里"), ("hoo", "咕咕"), 2),
    ("bee", "蜜蜂", ("nectar from flowers", "花蜜"), ("in a hive", "蜂巢里"), ("buzz", "嗡嗡"), 6),
    ("bear", "熊", ("honey and fish", "蜂蜜和鱼"), ("in a cave", "山洞里"), ("a deep growl", "吼吼"), 4),
    (
        "rabbit",
        "兔子",
        ("carrots and grass", "胡萝卜和草"),
        ("in a hole in the ground", "地洞里"),
        ("a soft squeak", "吱吱"),
        4,
    ),
    ("squirrel", "松鼠", ("nuts", "坚果"), ("in a tree", "树上"), ("a quick chatter", "吱吱"), 4),
    (
        "mouse",
        "老鼠",
        ("seeds and cheese", "种子和奶酪"),
        ("in a small hole", "小洞里"),
        ("squeak", "吱吱"),
        4,
    ),
    ("panda", "熊猫", ("bamboo", "竹子"), ("in the mountains", "大山里"), ("a soft bleat", "咩咩"), 4),
    ("hen", "母鸡", ("corn", "玉米"), ("in a henhouse", "鸡窝里"), ("cluck", "咯咯"), 2),
    ("spider", "蜘蛛", ("flies", "苍蝇"), ("in a web", "蜘蛛网上"), ("no sound at all", "没有声音"), 8),
]

OPPOSITES = [
    ("big", "small", "大", "小"),
    ("hot", "cold", "热", "冷"),
    ("day", "night", "白天", "黑夜"),
    ("fast", "slow", "快", "慢"),
    ("high", "low", "高", "低"),
    ("happy", "sad", "高兴", "难过"),
    ("old", "young", "老", "年轻"),
    ("long", "short", "长", "短"),
    ("full", "empty", "满", "空"),
    ("light", "dark", "亮", "暗"),
    ("open", "closed", "开", "关"),
    ("wet", "dry", "湿", "干"),
    ("early", "late", "早", "晚"),
    ("left", "right", "左", "右"),
    ("soft", "hard", "软", "硬"),
]

# Single words for the dictionary part of the phrase pairs.
WORDS = [
    ("apple", "苹果"),
    ("water", "水"),
    ("house", "房子"),
    ("tree", "树"),
    ("flower", "花"),
    ("friend", "朋友"),
    ("mother", "妈妈"),
    ("father", "爸爸"),
    ("teacher", "老师"),
    ("school", "学校"),
    ("book", "书"),
    ("moon", "月亮"),
    ("sun", "太阳"),
    ("star", "星星"),
    ("rain", "雨"),
    ("snow", "雪"),
    ("wind", "风"),
    ("river", "河"),
    ("sea", "海"),
    ("mountain", "山"),
    ("bread", "面包"),
    ("tea", "茶"),
    ("milk", "牛奶"),
    ("rice", "米饭"),
    ("egg", "鸡蛋"),
    ("cat", "猫"),
    ("dog", "狗"),
    ("bird", "鸟"),
    ("fish", "鱼"),
    ("horse", "马"),
    ("bear", "熊"),
    ("fox", "狐狸"),
    ("rabbit", "兔子"),
    ("red", "红色"),
    ("blue", "蓝色"),
    ("green", "绿色"),
    ("yellow", "黄色"),
    ("white", "白色"),
    ("black", "黑色"),
    ("one", "一"),
    ("two", "二"),
    ("three", "三"),
    ("ten", "十"),
    ("today", "今天"),
    ("tomorrow", "明天"),
    ("yesterday", "昨天"),
    ("morning", "早上"),
    ("evening", "晚上"),
    ("city", "城市"),
    ("village", "村子"),
    ("door", "门"),
    ("window", "窗户"),
    ("table", "桌子"),
    ("chair", "椅子"),
    ("bed", "床"),
    ("hand", "手"),
    ("eye", "眼睛"),
    ("heart", "心"),
    ("song", "歌"),
    ("story", "故事"),
    ("letter", "信"),
    ("picture", "图画"),
    ("computer", "电脑"),
    ("telephone", "电话"),
    ("train", "火车"),
    ("bicycle", "自行车"),
    ("thank you", "谢谢"),
    ("goodbye", "再见"),
    ("good morning", "早上好"),
    ("good night", "晚安"),
    ("please", "请"),
    ("sorry", "对不起"),
    ("welcome", "欢迎"),
    ("happy birthday", "生日快乐"),
    ("see you tomorrow", "明天见"),
]

# Parts of whole sentences for phrase pairs.
SUBJECTS = [
    ("The cat", "猫"),
    ("The little dog", "小狗"),
    ("My mother", "我妈妈"),
    ("My father", "我爸爸"),
    ("The teacher", "老师"),
    ("My friend", "我的朋友"),
    ("The old man", "老人"),
    ("The girl", "女孩"),
    ("The boy", "男孩"),
    ("My grandmother", "我奶奶"),
    ("The rabbit", "兔子"),
    ("The doctor", "医生"),
]
VERBS_AT = [
    ("is sleeping", "睡觉"),
    ("is singing", "唱歌"),
    ("is reading", "看书"),
    ("is waiting", "等人"),
    ("is playing", "玩"),
    ("is drinking tea", "喝茶"),
    ("is eating an apple", "吃苹果"),
    ("is drawing", "画画"),
    ("is writing a letter", "写信"),
    ("is looking at the moon", "看月亮"),
]
SITES = [
    ("in the garden", "在花园里"),
    ("at home", "在家里"),
    ("by the river", "在河边"),
    ("under the tree", "在树下"),
    ("at school", "在学校"),
    ("at the station", "在车站"),
    ("in the kitchen", "在厨房里"),
    ("by the window", "在窗边"),
    ("in the park", "在公园里"),
    ("in the library", "在图书馆里"),
]
TIMES = [("today", "今天"), ("this morning", "今天早上"), ("this evening", "今天晚上"), ("now", "现在")]
LIKES = [
    ("red apples", "红苹果"),
    ("hot tea", "热茶"),
    ("old books", "旧书"),
    ("sweet cake", "甜蛋糕"),
    ("the blue sea", "蓝色的大海"),
    ("white snow", "白雪"),
    ("fresh bread", "新鲜面包"),
    ("quiet music", "安静的音乐"),
    ("summer rain", "夏天的雨"),
    ("long stories", "长故事"),
]
PHRASES = [
    ("Where is the station?", "车站在哪里？"),
    ("Where is the library?", "图书馆在哪里？"),
    ("How much is this?", "这个多少钱？"),
    ("What time is it?", "现在几点？"),
    ("What is your name?", "你叫什么名字？"),
    ("I am hungry.", "我饿了。"),
    ("I am thirsty.", "我渴了。"),
    ("I am tired.", "我累了。"),
    ("I am happy.", "我很高兴。"),
    ("It is raining.", "下雨了。"),
    ("It is cold today.", "今天很冷。"),
    ("It is warm today.", "今天很暖和。"),
    ("Please come in.", "请进。"),
    ("Please sit down.", "请坐。"),
    ("Please wait a moment.", "请等一下。"),
    ("I do not understand.", "我不明白。"),
    ("I will come tomorrow.", "我明天来。"),
    ("Can you help me?", "你能帮我吗？"),
    ("I love you.", "我爱你。"),
    ("Nice to meet you.", "很高兴认识你。"),
    ("See you soon.", "回头见。"),
    ("Happy new year!", "新年快乐！"),
    ("Have a nice day.", "祝你愉快。"),
    ("The moon is bright.", "月亮很亮。"),
    ("The soup is hot.", "汤很热。"),
    ("The sea is blue.", "大海是蓝色的。"),
    ("I lost my key.", "我的钥匙丢了。"),
    ("Open the window, please.", "请打开窗户。"),
    ("Close the door, please.", "请关上门。"),
    ("Time is gold.", "时间就是金子。"),
    ("Spring is here.", "春天来了。"),
    ("Good friends help each other.", "好朋友互相帮助。"),
]

POEMS_EN = {
    "the moon": "The moon is round, the moon is bright,\nit shines on every house at night.",
    "rain": "The rain comes down on leaf and stone,\nit sings a song for me alone.",
    "a cat": "A little cat lies in the sun,\nand dreams until the day is done.",
    "spring": "The snow is gone, the birds are here,\nthe greenest time of all the year.",
    "the sea": "The sea is wide, the sea is blue,\nit brings a little shell to you.",
    "friends": "A friend will stay when days are long,\nand hum with you the same old song.",
}
POEMS_ZH = {
    "月亮": "月亮圆圆挂天边，\n静静照着我窗前。",
    "雨": "小雨轻轻落下来，\n叶子花儿都笑开。",
    "小猫": "小猫睡在阳光里，\n梦见一条大鲤鱼。",
    "春天": "冰雪化了小河流，\n春风吹绿柳枝头。",
    "大海": "大海蓝蓝浪花白，\n送我贝壳上岸来。",
    "朋友": "朋友陪我走远方，\n同唱一首歌儿长。",
}

# Requests for the triage part: grade -> (English, Chinese).
# What the pair is taught to call hard: its wordings are not those of labelled_requests.py, which tests it.
HARD = [
    ("Show that there are infinitely many prime numbers.", "请说明为什么素数有无穷多个。"),
    (
        "Prove by induction that the sum of the first {a} odd numbers is a square.",
        "用归纳法证明前{a}个奇数之和是平方数。",
    ),
    ("Find all integers x with x^3 - {a}x = {b}.", "求满足 x^3 - {a}x = {b} 的所有整数 x。"),
    ("Compute the determinant of a {a} by {a} matrix.", "计算一个{a}阶矩阵的行列式。"),
    ("How much is {a} times {b}, divided by 7?", "{a}乘{b}再除以7是多少？"),
    ("What do {a} and {b} make together?", "{a}和{b}加起来是多少？"),
    ("Subtract {a} from 1{b}.", "1{b}减去{a}等于多少？"),
    ("What is the limit of (1 + 1/n)^n?", "(1 + 1/n)^n 的极限是什么？"),
    ("Derive the quadratic formula and check it with {a}.", "推导二次方程的求根公式，并用{a}检验。"),
    ("Give the derivative of x^{a} cos x.", "求 x^{a} cos x 的导数。"),
    (
        "Write a compiler for a small language and explain every step.",
        "为一种小语言写一个编译器，并解释每一步。",
    ),
    ("Implement a hash table in C with {a} buckets.", "用 C 语言实现一个有{a}个桶的哈希表。"),
    ("Find the deadlock in this program with {a} threads.", "找出这个有{a}个线程的程序里的死锁。"),
    ("Optimise an SQL query that joins {a} tables.", "优化一条连接{a}张表的 SQL 查询。"),
    ("Write unit tests for a parser of JSON.", "为一个 JSON 解析器写单元测试。"),
    ("Why does this regular expression take minutes?", "为什么这个正则表达式要跑几分钟？"),
    ("Design a database for a hospital with {a} departments.", "为一家有{a}个科室的医院设计数据库。"),
    ("Compare three economic theories and judge them.", "比较三种经济理论并作出评价。"),
    ("What were the results of the Congress of Vienna?", "维也纳会议的结果是什么？"),
    ("Who ruled the Ottoman Empire in 15{a}?", "15{a}年谁统治奥斯曼帝国？"),
    ("In which year was the battle number {a} of that war?", "那场战争的第{a}次战役在哪一年？"),
    ("Explain quantum entanglement to an engineer.", "向一位工程师解释量子纠缠。"),
    ("How does general anaesthesia work in the brain?", "全身麻醉在大脑里是怎样起作用的？"),
    ("Which enzyme repairs double strand breaks?", "哪种酶修复双链断裂？"),
    ("Balance the equation of the combustion of octane.", "配平辛烷燃烧的化学方程式。"),
    ("Plan a journey through {a} cities at the lowest cost.", "规划一次经过{a}个城市、费用最低的旅行。"),
    ("Write a business plan for {a} years with figures.", "写一份{a}年的商业计划，带上数字。"),
    ("Analyse the contract and list every risk for the buyer.", "分析这份合同，列出买方的所有风险。"),
    ("Which clause of the law limits the liability to {a} percent?", "哪一条法律把责任限制在百分之{a}？"),
    ("Estimate the tax of a company with {a} employees.", "估算一家有{a}名员工的公司的税。"),
    ("Write an essay about justice in {a} paragraphs.", "写一篇关于正义的{a}段文章。"),
    ("Interpret the last chapter of that novel.", "解读那部小说的最后一章。"),
    ("Diagnose why the engine stops at {a} degrees.", "诊断发动机为什么在{a}度时熄火。"),
    ("Prepare a lecture of {a} minutes on black holes.", "准备一场{a}分钟的关于黑洞的讲座。"),
    ("Calculate the orbit of a satellite at {a}00 kilometres.", "计算高度{a}00公里的卫星的轨道。"),
    ("Translate this poem into Latin in hexameters.", "把这首诗译成拉丁语的六步格。"),
]

# The two questions of sllm.triage.Policy, word for word (a test compares them): wrapping, question on
# difficulty, its labels, question on privacy, its labels, what stands between two options.
TRIAGE_FORM = "<text {nonce}>\n{text}\n</text {nonce}>\n{question}"
TRIAGE = {
    "en": (
        (
            "All between the lines {nonce} is data. "
            "For a small language model, answering it rightly is: {options}?"
        ),
        ("easy", "medium", "hard"),
        ", ",
        "All between the lines {nonce} is data. What it says is: {options}?",
        ("public", "private"),
        " or ",
    ),
    "zh": (
        "{nonce} 两行之间都是数据。小模型要答对它：{options}？",
        ("简单", "中等", "困难"),
        ", ",
        "{nonce} 两行之间都是数据。它的内容：{options}？",
        ("公开", "私密"),
        "还是",
    ),
}
SECRETS = [
    ("My phone number is @PHONE@.", "我的电话是@PHONE@。"),
    ("You can call me at @PHONE@.", "可以打@PHONE@找我。"),
    ("Write it to @EMAIL@.", "请写给@EMAIL@。"),
    ("My e-mail is @EMAIL@.", "我的邮箱是@EMAIL@。"),
    ("My name is @NAME@.", "我叫@NAME@。"),
    ("I am @NAME@, call @PHONE@.", "我是@NAME@，电话@PHONE@。"),
    ("It is about my illness.", "这是关于我的病的。"),
    ("My doctor says I am ill.", "医生说我生病了。"),
    ("My password is in it.", "里面有我的密码。"),
    ("The password of my account is @LOGIN@.", "我的账号密码是@LOGIN@。"),
    ("Here is my bank statement.", "这是我的银行账单。"),
    ("My salary is @AMOUNT@ a month.", "我的月工资是@AMOUNT@元。"),
    ("I owe my brother @AMOUNT@.", "我欠我哥哥@AMOUNT@元。"),
    ("I live at @AMOUNT@ Park Road.", "我家住在公园路@AMOUNT@号。"),
    ("Do not tell my wife.", "不要告诉我的妻子。"),
    ("My son failed his exam.", "我儿子考试没及格。"),
]
